"""The project's errors; in a bundle, `storage/errors.py` itself stands here."""

from storage.errors import ConfigError, RefusedInput, TomoscaleError

__all__ = ["ConfigError", "RefusedInput", "TomoscaleError"]
