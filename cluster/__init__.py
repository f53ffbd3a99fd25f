"""Where jobs run: the local stack, the job client, the doctor. Imports nothing of `ssl_core`."""
