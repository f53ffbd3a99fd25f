"""Disasters on machines of namespaces, and the table of what each of them costs: `make chaos`."""
