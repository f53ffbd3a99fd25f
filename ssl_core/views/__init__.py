"""From a host crop to views: pixels on the training device and the geometry that made them. Knows no network."""
