"""A class or a number of a whole volume: targets, training, scores and comparison of starts."""
