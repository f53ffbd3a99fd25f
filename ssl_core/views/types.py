"""Views: pixels that know where they came from.

Axes: B batch, C channels, D H W voxels (inferior-superior, posterior-anterior, left-right).
Geometry uses edge coordinates: voxel i covers [i, i+1), so the centre of voxel i is i + 0.5. Every position is
ordered (D, H, W). A view's geometry is the affine map from its own edge coordinates (in view voxels) to edge
coordinates of the volume it was cut from (in volume voxels), so flips, scale, rotation and crop are one thing. A view
that was deformed elastically has a displacement besides, applied before the affine map.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ssl_core.superpixels.settings import Superpixels
from ssl_core.to_device import filled


@dataclass(frozen=True)
class View:
    """One view of each of B samples.

    Attributes:
        image_BCDHW: Normalised intensities after spatial and intensity transforms.
        to_volume_B34: float64; view edge coordinates (view voxels) to volume edge coordinates (volume voxels).
        position_B3: Centre of the view as a fraction of the volume's shape, in [0, 1] where the centre is inside.
        clean_BCDHW: After the spatial and before the intensity transforms; present when the role asks for it.
        valid_B1DHW: 1 where the view shows voxels of the volume, 0 where it shows padding.
        maps: Integer maps (B, D, H, W), int64, carried through the same transform with nearest sampling (labels,
            super-pixels); 0 in the padding.
        elastic: Deformation of the view, where its role asks for one.
    """

    image_BCDHW: Tensor
    to_volume_B34: Tensor
    position_B3: Tensor
    valid_B1DHW: Tensor
    clean_BCDHW: Tensor | None = None
    maps: Mapping[str, Tensor] = field(default_factory=dict)
    elastic: "Elastic | None" = None

    @property
    def size_DHW(self) -> tuple[int, int, int]:
        """Voxels of the view along D, H, W."""
        d, h, w = self.image_BCDHW.shape[2:]
        return int(d), int(h), int(w)


@dataclass(frozen=True)
class Elastic:
    """A smooth displacement: view point u shows the volume at `to_volume(u + displacement(u))`.

    Attributes:
        control_B3abc: float64 coefficients of a cubic B-spline, view voxels; see `ssl_core.views.augment.elastic`.
        spacing_vox: Distance of the control points, view voxels.
    """

    control_B3abc: Tensor
    spacing_vox: float


@dataclass(frozen=True)
class ViewBatch:
    """All views of a batch, by role.

    Attributes:
        roles: For each role of the `ViewSpec`, its `count` views in order.
        volume_B: Index of each sample's volume in the manifest, int64.
        sample_B: Global index of each sample in the stream, int64; identifies a sample whatever the batch split.
        spacing_B3: Voxel spacing of each sample's volume, mm, (D, H, W), float64.
        shape_B3: Voxels of each sample's volume, (D, H, W), float64.
    """

    roles: Mapping[str, tuple[View, ...]]
    volume_B: Tensor
    sample_B: Tensor
    spacing_B3: Tensor
    shape_B3: Tensor

    def __len__(self) -> int:
        """Samples in the batch."""
        return int(self.volume_B.shape[0])


@dataclass(frozen=True)
class RoleSpec:
    """What a method wants from one role of view.

    Attributes:
        name: Role name, unique in the spec.
        count: Views of this role in a sample.
        size_DHW: Voxels of the view.
        scale: Lowest and highest ratio of the box cut from the volume to the view, drawn once a view for H and W.
        scale_depth: Whether D is scaled too.
        scale_share: Share of views that are scaled; the others have scale 1.
        flip: Probability of a flip along each of D, H, W.
        rotate_degrees: Largest rotation about the D axis, in either direction, rigid in millimetres.
        tilt_degrees: Largest rotation about the H axis and about the W axis, in either direction, rigid in millimetres.
            A sample whose box would then not fit into the host crop (slices far apart) keeps its rotation about D only.
        rotate_share: Share of views that are rotated and tilted; the others are upright.
        stretch: Largest relative change of the scale of each axis by itself, in either direction; D only with
            `scale_depth`.
        elastic_vox: Largest elastic displacement along each axis, view voxels; 0 for none.
        min_overlap: Least intersection over union of this role's boxes with the first view of the role `overlaps`
            (with each other when `overlaps` is empty). 0 places boxes independently in the host crop.
        overlaps: Another role to overlap with.
        inside_union: Whether boxes lie inside the bounding box of the union of the views of role `overlaps`.
        share_spatial: Whether all views of the role use the same flips, scale, rotation and deformation (their boxes
            still differ).
        centred: Whether boxes lie about the voxel that the crop was drawn about, as far as volume and crop allow, and
            not anywhere in the crop. A small structure that the crop was drawn for is then in the view.
        offset_vox: When set, later views are the first box shifted along D by a whole number of voxels drawn from this
            closed range, either sign; for slice and sub-volume pairs. Scale and rotation are then shared as well.
        intensity: Name of the intensity augmentation, one of `ssl_core.views.augment.presets.PRESETS` (`none`, `light`,
            `strong`, `nnunet`, `genesis`, `pcrlv2`, `pcrlv2_local`).
        keep_clean: Whether `View.clean_BCDHW` is kept.
    """

    name: str
    count: int
    size_DHW: tuple[int, int, int]
    scale: tuple[float, float] = (1.0, 1.0)
    scale_depth: bool = False
    flip: tuple[float, float, float] = (0.0, 0.0, 0.0)
    rotate_degrees: float = 0.0
    tilt_degrees: float = field(default=0.0, kw_only=True)
    stretch: float = field(default=0.0, kw_only=True)
    scale_share: float = field(default=1.0, kw_only=True)
    rotate_share: float = field(default=1.0, kw_only=True)
    centred: bool = field(default=False, kw_only=True)
    elastic_vox: float = 0.0
    min_overlap: float = 0.0
    overlaps: str = ""
    inside_union: bool = False
    share_spatial: bool = False
    offset_vox: tuple[int, int] | None = None
    intensity: str = "light"
    keep_clean: bool = False


@dataclass(frozen=True)
class ViewSpec:
    """All roles of a method and the integer maps it needs.

    `maps` are names of maps in the store: labels, or maps that were computed, such as super-pixels. `superpixels` says
    how those among them are made that a job may compute itself, each under its settings' `name`.

    `ssl_core.views.placement_size.host_size` says how large a crop the stream must read for it.
    """

    roles: tuple[RoleSpec, ...]
    maps: tuple[str, ...] = ()
    superpixels: tuple[Superpixels, ...] = ()


def centre_of(to_volume_B34: Tensor, size_DHW: tuple[int, int, int]) -> Tensor:
    """Volume edge coordinates of the views' centres, (B, 3), float64."""
    middle = filled([n / 2 for n in size_DHW], to_volume_B34.device)
    return to_volume_B34[:, :, :3] @ middle + to_volume_B34[:, :, 3]
