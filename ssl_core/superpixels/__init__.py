"""Super-pixels of a volume: their settings, and the segmentation that makes them."""
