"""Networks from MONAI (and nnU-Net's residual encoder) behind one feature-pyramid contract."""
