"""Search of fine-tuning settings as a Ray job: `python -m jobs.tune CONFIG [key=value ...]`.

Ray Tune runs the trials. What to try next and what to stop is decided in `state` from the recorded scores alone, and
what is recorded lies on object storage, so that a search goes on after its driver's death with as many trials at a
time as it is then given.
"""
