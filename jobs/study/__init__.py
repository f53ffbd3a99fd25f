"""Studies: starts compared over draws of labelled subjects, as a job: `python -m jobs.study CONFIG [key=value ...]`."""
