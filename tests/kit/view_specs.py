"""Views that between them use everything that a role can ask for."""

from ssl_core.views.types import RoleSpec, ViewSpec

PAIR = RoleSpec("pair", 2, (12, 16, 20), scale=(0.7, 1.3), flip=(0.5, 0.5, 0.5), min_overlap=0.2, keep_clean=True)

TURNED = RoleSpec("turned", 1, (10, 18, 14), scale=(0.8, 1.2), scale_depth=True, rotate_degrees=35, overlaps="pair")

WAVY = RoleSpec("wavy", 2, (14, 18, 16), flip=(0.5, 0.5, 0.5), elastic_vox=1.5)

EVERYTHING = ViewSpec((PAIR, TURNED, WAVY), maps=("label",))

TILTED = RoleSpec(
    "tilted", 2, (10, 18, 14), (0.8, 1.3), True, (0.5, 0.5, 0.5), 30, min_overlap=0.2, tilt_degrees=20, stretch=0.2
)
