"""From a host crop to views: pixels on the training device and the geometry that made them. Knows no network."""

from ssl_core.views.types import RoleSpec, View, ViewBatch, ViewSpec

__all__ = ["RoleSpec", "View", "ViewBatch", "ViewSpec"]
