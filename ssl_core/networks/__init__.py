"""Networks from MONAI (and nnU-Net's residual encoder) behind one feature-pyramid contract."""

from ssl_core.networks.backbone import Backbone, Level
from ssl_core.networks.registry import backbone_names, build

__all__ = ["Backbone", "Level", "backbone_names", "build"]
