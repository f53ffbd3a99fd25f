"""The command line. Nobody enters it."""
