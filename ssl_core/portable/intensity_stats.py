"""The definition of a volume's intensity statistics; in a bundle, `storage/intensity_stats.py` itself stands here."""

from storage.intensity_stats import STATS_ORDER, channel_foreground

__all__ = ["STATS_ORDER", "channel_foreground"]
