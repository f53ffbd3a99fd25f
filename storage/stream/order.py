"""The order of samples as a pure function: no state, no shuffle buffer, nothing that grows with the volumes.

Sample i lies on lane `i % lanes`; along its lane it is cut `c` of visit `j`; visit j of a lane is visit
`p = j * lanes + lane` of the whole stream; visit p belongs to epoch `p // n` and goes to volume
`perm(seed, epoch, n)(p % n)`. So every volume is visited exactly once an epoch, ranks own lanes, and a change of world
size moves lanes and not samples.

Lanes are out of step: lane l begins `phase(l)` cuts into its first visit. Without that, all lanes would come to a new
volume in the same batch, and reads would come in bursts that need twice the memory to smooth.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from storage.errors import ConfigError

Int64s = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]
Box3 = tuple[int, int, int]

ROUNDS = 8
# Third counter word of Philox: keeps the draws of this module apart from those of other users of (seed, sample).
_TAG_PERM, _TAG_CROP = 0x7065726D, 0x63726F70


@dataclass(frozen=True, slots=True)
class Places:
    """Where samples lie in the order; every field has shape (B,), int64."""

    lane: Int64s
    visit: Int64s
    cut: Int64s
    epoch: Int64s
    position: Int64s
    """Index of the volume among the n volumes of the stream."""


def perm(seed: int, epoch: int, n: int) -> Callable[[int], int]:
    """The permutation of range(n) for one epoch, O(1) in time and memory for each item whatever n is."""

    def at(i: int) -> int:
        if not 0 <= i < n:
            raise IndexError(f"item {i} of a permutation of {n}")
        return int(permute(seed, np.array([epoch]), n, np.array([i]))[0])

    return at


def permute(seed: int, epoch_B: Int64s, n: int, i_B: Int64s) -> Int64s:
    """Volume `perm(seed, epoch, n)(i)` of each pair (epoch, i), (B,), int64.

    An alternating Feistel network on Z_a x Z_b with a * b >= n, walked until it lands inside range(n) (Black and
    Rogaway, "Ciphers with arbitrary finite domains", 2002, methods 2 and 3). With a and b near sqrt(n) a walk takes
    about one step; only n below 16 takes more.
    """
    a = max(4, int(np.ceil(np.sqrt(n))))
    b = max(4, -(-n // a))
    epochs, inverse = np.unique(epoch_B, return_inverse=True)
    keys_RB = np.stack([_round_keys(seed, int(e)) for e in epochs], axis=1)[:, inverse.reshape(-1)]
    out = np.array(i_B, dtype=np.uint64).reshape(-1)
    pending = np.arange(out.size)
    while pending.size:
        out[pending] = _feistel(out[pending], keys_RB[:, pending], np.uint64(a), np.uint64(b))
        pending = pending[out[pending] >= n]
    return out.astype(np.int64)


def phase(lane_B: Int64s, crops_per_visit: int) -> Int64s:
    """Cuts that a lane's first visit leaves out, (B,), int64.

    The digit sum of the lane in base `crops_per_visit`, modulo it (a generalised Thue-Morse sequence): every phase is
    about equally frequent among all lanes and among the lanes of any one rank, which are an arithmetic progression.
    """
    rest, total = np.array(lane_B, dtype=np.int64), np.zeros_like(lane_B, dtype=np.int64)
    while crops_per_visit > 1 and rest.any():
        total += rest % crops_per_visit
        rest //= crops_per_visit
    phases: Int64s = total % crops_per_visit
    return phases


def places(sample_B: Int64s, *, seed: int, n: int, lanes: int, crops_per_visit: int) -> Places:
    """Lane, visit, cut, epoch and volume position of global samples, in time independent of n and of the samples."""
    sample_B = np.asarray(sample_B, dtype=np.int64)
    lane = sample_B % lanes
    along = sample_B // lanes + phase(lane, crops_per_visit)
    visit, cut = along // crops_per_visit, along % crops_per_visit
    overall = visit * lanes + lane
    epoch = overall // n
    return Places(lane, visit, cut, epoch, permute(seed, epoch, n, overall % n))


def owned(first: int, global_batch: int, *, lanes: int, rank: int, world: int) -> Int64s:
    """Global samples of the batch that starts at `first` whose lane rank `rank` of `world` owns, ascending.

    Raises:
        ConfigError: `lanes` is no multiple of `world`.
    """
    if lanes % world:
        raise ConfigError("lanes", expected=f"a multiple of the world size {world}", found=str(lanes))
    # Of a multiple of `world` lanes a rank's are every `world`-th: what it takes to list them is flat in the ranks.
    of_rank: Int64s = np.arange(first + (rank - first) % world, first + global_batch, world, dtype=np.int64)
    return of_rank


def worlds(lanes: int, global_batch: int) -> tuple[int, ...]:
    """Numbers of ranks that can share lanes and batch evenly, ascending."""
    return tuple(n for n in range(1, min(lanes, global_batch) + 1) if lanes % n == 0 and global_batch % n == 0)


def check(*, seed: int, lanes: int, global_batch: int, crops_per_visit: int, world: int = 1, rank: int = 0) -> None:
    """Refuse numbers that do not divide, and propose some that do.

    Raises:
        ConfigError: names the setting.
    """
    for name, value in (
        ("lanes", lanes),
        ("global_batch", global_batch),
        ("crops_per_visit", crops_per_visit),
        ("world", world),
    ):
        if value < 1:
            raise ConfigError(name, expected="a whole number of at least 1", found=str(value))
    if not 0 <= seed < 2**63:
        raise ConfigError("seed", expected="a whole number from 0 to 2**63 - 1", found=str(seed))
    if not 0 <= rank < world:
        raise ConfigError("rank", expected=f"0 to {world - 1} in a world of {world}", found=str(rank))
    for name, value, why in (
        ("lanes", lanes, "every rank owns the same number of lanes"),
        ("global_batch", global_batch, "every rank takes the same share of a batch"),
    ):
        if value % world:
            sizes = worlds(lanes, global_batch)
            near = sorted({max(world, value // world * world), (value // world + 1) * world})
            raise ConfigError(
                name,
                expected=f"a multiple of the world size {world}, so that {why}",
                found=str(value),
                remedy=f"set {name} to {' or '.join(map(str, near))}, or run with "
                f"{', '.join(map(str, sizes[:12]))} worker{'s' if sizes != (1,) else ''}",
            )


def crop_centre(
    sample: int,
    *,
    seed: int,
    shape: Box3,
    box: tuple[Box3, Box3],
    points: Sequence[Sequence[Box3]] = (),
    foreground: float = 1.0,
    class_balance: float = 0.0,
) -> Box3:
    """Voxel (D, H, W) that the crop of one sample is drawn about; a function of the arguments and of nothing else.

    With probability `class_balance` (where the volume has labelled points) it is one of them: first a class is drawn,
    each as likely as the others, then one of its points. Otherwise it is a voxel drawn uniformly from `box` with
    probability `foreground`, else from the whole volume.

    Args:
        sample: Global sample index.
        shape: Voxels of the volume.
        box: Foreground, first voxel and one past the last.
        points: For each labelled class, voxels of that class.
    """
    u = _crop_uniforms(seed, sample)
    classes = [p for p in points if len(p)]
    if classes and u[0] < class_balance:
        points_of_class = classes[int(u[2] * len(classes))]
        return points_of_class[int(u[3] * len(points_of_class))]
    lo, hi = box if u[1] < foreground else ((0, 0, 0), shape)
    d, h, w = (low + int(x * max(1, high - low)) for x, low, high in zip(u[2:], lo, hi, strict=True))
    return d, h, w


def crop_start(centre: Box3, *, shape: Box3, size: Box3) -> Box3:
    """First voxel (D, H, W) of a crop about a centre.

    On axes where the volume is larger than the crop the crop is moved inside; where it is smaller the volume lies in
    the middle of the crop, which reaches beyond it.

    Args:
        centre: Voxel of the volume.
        shape: Voxels of the volume.
        size: Voxels of the crop.
    """
    d, h, w = (
        min(max(c - s // 2, 0), n - s) if n >= s else -((s - n) // 2)
        for c, n, s in zip(centre, shape, size, strict=True)
    )
    return d, h, w


def drawn_class(sample: int, *, seed: int, classes: int, class_balance: float) -> tuple[int, float] | None:
    """Which of so many classes the crop of a sample is centred on, each as likely; None where it is on none of them.

    Beside it a number in [0, 1) that `crop_centre` does not use for such a sample: it draws the volume.
    """
    if not classes:
        return None
    u = _crop_uniforms(seed, sample)
    return (int(u[2] * classes), float(u[4])) if u[0] < class_balance else None


def _crop_uniforms(seed: int, sample: int) -> npt.NDArray[np.float64]:
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, _TAG_CROP, sample])).random(5)


@lru_cache(maxsize=4096)
def _round_keys(seed: int, epoch: int) -> UInt64s:
    return np.random.Philox(key=seed, counter=[0, 0, _TAG_PERM, epoch]).random_raw(ROUNDS)


def _feistel(x_B: UInt64s, keys_RB: UInt64s, a: np.uint64, b: np.uint64) -> UInt64s:
    left, right = x_B // b, x_B % b
    for r, key_B in enumerate(keys_RB):
        if r % 2 == 0:
            left = (left + _mix(right ^ key_B) % a) % a
        else:
            right = (right + _mix(left ^ key_B) % b) % b
    return left * b + right


def _mix(x: UInt64s) -> UInt64s:
    # The finaliser of MurmurHash3 (public domain): every input bit reaches every output bit. Products wrap on purpose.
    x = x ^ (x >> np.uint64(33))
    x = x * np.uint64(0xFF51AFD7ED558CCD)
    x = x ^ (x >> np.uint64(33))
    x = x * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))
