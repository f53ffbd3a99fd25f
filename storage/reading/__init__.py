"""From a crop to voxels: plan byte ranges, fetch and decode them, keep them in the node's cache, verify them."""
