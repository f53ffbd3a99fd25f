"""Readers: a file or a series of files in, one `RawVolume` out, or a refusal that says why."""
