"""The project's errors; in a bundle, `storage/errors.py` itself stands here."""

from storage.errors import ConfigError, RefusedInput, StackError, TomoscaleError

__all__ = ["ConfigError", "RefusedInput", "StackError", "TomoscaleError"]
