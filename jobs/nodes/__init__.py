"""Whether the nodes of a cluster are alike and reach what jobs need, asked by a task on each of them."""
