"""`tomoscale demo`: the whole path on one machine, from volumes to a report."""
