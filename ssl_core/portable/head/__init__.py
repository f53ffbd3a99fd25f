"""A class or a number of a whole volume: the linear head of a bundle, and what it makes of a scan."""
