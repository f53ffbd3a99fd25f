"""How costs grow with nodes, volumes and steps: the product's own code with many ranks and many volumes pretended."""
