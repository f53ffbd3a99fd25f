import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.errors import ConfigError, CorruptChunk, StoreError
from storage.format.manifest import Manifest
from storage.format.records import LabelRecord, VolumeRecord, without_places
from storage.intensity_stats import STATS_ORDER
from storage.reading.volume_store import Crop
from storage.stream.crop_stream import CropStream
from storage.stream.plan import Plan, StreamSpec, order_digest, select
from storage.stream.read_ahead import ClosedError
from storage.testing.streams import Jittery, StreamContract, rows

SHAPES = [(9, 11, 13), (20, 6, 8), (5, 7, 30), (12, 12, 12), (8, 9, 10), (16, 5, 6), (10, 10, 7)]


class ArraySource:
    """Volumes in memory; what the order needs and nothing else."""

    def __init__(self, volumes: int = 7, channels: int = 1, dtypes: Sequence[str] = ("int16",)) -> None:
        rng = np.random.default_rng(1)
        self.arrays: dict[str, np.ndarray] = {}
        self.labels: dict[str, np.ndarray] = {}
        records = []
        for i in range(volumes):
            name, shape = f"vol-{i:03d}", SHAPES[i % len(SHAPES)]
            self.arrays[name] = rng.integers(-1000, 1000, (channels, *shape)).astype(dtypes[i % len(dtypes)])
            label = np.zeros((1, *shape), np.uint8)
            label[0, 1, 2, 3] = 2
            label[0, 3, 4, 5] = 1
            self.labels[name] = label
            records.append(record(name, shape, channels, dtypes[i % len(dtypes)], scale=1.0 + i, split="train"))
        self._manifest = Manifest.from_records(records, {"name": "arrays"})

    @property
    def manifest(self) -> Manifest:
        return self._manifest

    def read_volume(self, volume_id: str, label: str | None = None) -> np.ndarray:
        return (self.arrays if label is None else self.labels)[volume_id]

    def read_many(self, crops: Sequence[Crop], label: str | None = None) -> list[np.ndarray]:
        out = []
        for crop in crops:
            whole = self.read_volume(crop.volume_id, label)
            index = [np.arange(a, a + s) for a, s in zip(crop.start_DHW, crop.size_DHW, strict=True)]
            found = whole[:, *np.ix_(*[np.clip(i, 0, n - 1) for i, n in zip(index, whole.shape[1:], strict=True)])]
            out.append(np.ascontiguousarray(found))
        return out


def record(
    name: str, shape: tuple[int, int, int], channels: int = 1, dtype: str = "int16", scale: float = 1.0, split: str = ""
) -> VolumeRecord:
    labels = (LabelRecord("organs", (1, 2), (1, 1), points=(((3, 4, 5),), ((1, 2, 3),))),)
    return VolumeRecord(
        volume_id=name, subject=name, study="", split=split, modality="MR", shape_DHW=shape, channels=channels,
        spacing_mm=(3.0, 1.0, 0.5), affine=tuple(np.eye(4).ravel().tolist()), orientation="RAS", dtype=dtype,
        scale=scale, offset=0.5, foreground_lo=(1, 1, 1), foreground_hi=(4, 4, 5),
        stats=(dict.fromkeys(STATS_ORDER, 2.0),) * channels, labels=labels,
        source=name, source_sha256="", content_sha256="", reader="", policy="", notes=(),
        chunk_DHW=(8, 8, 8), shard_DHW=(8, 8, 8),
    )  # fmt: skip


class TestArrays(StreamContract):
    @pytest.fixture
    def source(self) -> ArraySource:
        return ArraySource()


SPEC = StreamContract.spec


@given(
    seed=st.integers(0, 2**63 - 1),
    batches=st.lists(st.tuples(st.sampled_from([1, 2, 3, 4, 6]), st.integers(1, 3)), min_size=1, max_size=5),
    lanes=st.sampled_from([12, 24, 36]),
    cuts=st.integers(1, 5),
    volumes=st.integers(1, 40),
    jitter=st.booleans(),
)
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow])
def test_any_history_of_world_sizes_gives_the_same_sequence(
    seed: int, batches: list[tuple[int, int]], lanes: int, cuts: int, volumes: int, jitter: bool
) -> None:
    spec = StreamSpec(seed=seed, global_batch=12, crop_DHW=(4, 5, 6), lanes=lanes, crops_per_visit=cuts)
    source: Any = ArraySource(volumes)
    contract = StreamContract()
    total = sum(count for _, count in batches)
    whole = contract.sequence(source, total, spec=spec)
    found: list[Any] = []
    for i, (world, count) in enumerate(batches):
        slow = Jittery(source, i, 0.002) if jitter else source
        found += contract.sequence(slow, count, world=world, start=len(found), spec=spec, threads=1 + i)
    assert found == whole


@given(
    start=st.integers(0, 500), batch=st.integers(1, 30), lanes=st.integers(1, 40), cuts=st.integers(1, 5),
    memory=st.sampled_from([1, 20_000, 60_000, 1 << 30]),
)  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_a_plan_reads_each_sample_once_and_before_its_batch(
    start: int, batch: int, lanes: int, cuts: int, memory: int
) -> None:
    source = ArraySource(3)
    spec = StreamSpec(seed=1, global_batch=batch, crop_DHW=(4, 5, 6), lanes=lanes, crops_per_visit=cuts)
    plan = Plan(source.manifest, spec, select(source.manifest, spec), start=start, memory_bytes=memory)
    held: set[int] = set()
    for k in range(3 + 2 * lanes * cuts // batch):
        for group in plan.reads(k):
            assert len({cut.volume for cut in group}) == 1
            assert 1 <= len(group) <= plan.per_read
            new = {cut.sample for cut in group}
            assert not new & held
            held |= new
        wanted = plan.batch(k)
        assert wanted == list(range(start + k * batch, start + (k + 1) * batch))
        assert held >= set(wanted)
        held -= set(wanted)
        held_bytes = len(held) * 4 * 5 * 6 * 2
        assert held_bytes <= max(2 * memory, 0) or plan.per_read == 1


def test_memory_is_bounded_by_reading_less_of_a_visit_at_a_time() -> None:
    source = ArraySource()
    crop = int(np.prod(SPEC.crop_DHW)) * 2
    indices = select(source.manifest, SPEC)
    for memory, per_read in ((1 << 30, 3), (SPEC.lanes * crop, 3), (SPEC.lanes * crop // 2, 2), (1, 1)):
        assert Plan(source.manifest, SPEC, indices, memory_bytes=memory).per_read == per_read
    assert Plan(source.manifest, SPEC, indices, memory_bytes=SPEC.lanes * crop // 4, world=2).per_read == 2


def test_memory_is_sized_by_the_largest_volume_not_the_first() -> None:
    source = ArraySource()
    records = [source.manifest.record(i) for i in range(len(source.manifest))]
    large = Manifest.from_records([*records[:-1], replace(records[-1], dtype="float32")])
    indices = select(large, SPEC)
    assert indices[0] != len(records) - 1
    memory = SPEC.lanes * int(np.prod(SPEC.crop_DHW)) * 2
    assert Plan(large, SPEC, indices, memory_bytes=memory).per_read == 2
    assert Plan(large, SPEC, indices[indices != len(records) - 1], memory_bytes=memory).per_read == 3


def test_a_plan_keeps_the_points_that_it_draws_from_and_no_others() -> None:
    """Of a hundred classes they take 0.8 MB a volume, and a plan keeps thousands of records."""
    source = ArraySource()
    for label, balance in ((None, 0.0), ("organs", 0.0), ("organs", 0.5)):
        spec = replace(SPEC, label=label, class_balance=balance)
        plan = Plan(source.manifest, spec, select(source.manifest, spec))
        whole = source.manifest.record(3)
        assert plan.record(3) == (whole if balance else without_places(whole))
        assert whole.labels[0].points
        assert not without_places(whole).labels[0].points


@pytest.mark.parametrize("start", [0, 77])
def test_lanes_open_volumes_at_a_steady_rate_and_the_first_batch_reads_itself_alone(start: int) -> None:
    spec = StreamSpec(seed=0, global_batch=8, crop_DHW=(4, 4, 4), lanes=64, crops_per_visit=4)
    source = ArraySource()
    plan = Plan(source.manifest, spec, select(source.manifest, spec), start=start)
    read = [sum(map(len, plan.reads(k))) for k in range(32)]
    assert read[:8] == [8] * 8
    assert max(read) <= 18, "reading ahead is spread over the first visits; it would be 32 where a batch opened eight"
    later = [len(plan.reads(k)) for k in range(32, 96)]  # after the first visits, which are read cut by cut
    assert sum(later) == 64 * 8 // 4
    assert max(later) <= (3 if start == 0 else 4)


def test_labels_and_class_balance() -> None:
    source = ArraySource()
    spec = StreamSpec(4, 12, (1, 1, 1), lanes=12, label="organs", class_balance=1.0)
    with CropStream(source, spec) as stream:
        found = np.concatenate([next(stream).label_BDHW.reshape(-1) for _ in range(10)])  # type: ignore[union-attr]
    assert set(found.tolist()) == {1, 2}
    assert 30 < (found == 2).sum() < 90
    spec = StreamSpec(4, 12, (3, 4, 5), lanes=12, label="organs")
    with CropStream(source, spec) as stream:
        batch = next(stream)
    assert batch.label_BDHW is not None
    assert batch.label_BDHW.shape == (12, 3, 4, 5)
    assert batch.label_BDHW.dtype == np.uint8
    for b in range(12):
        name = source.manifest.record(int(batch.volume_B[b])).volume_id
        expected = source.read_many([Crop(name, tuple(batch.start_B3[b].tolist()), (3, 4, 5))], "organs")[0][0]
        assert np.array_equal(batch.label_BDHW[b], expected)


class _Rare(ArraySource):
    """Class 9 is one voxel of one of seven volumes, class 5 of two; 1 and 2 are in all."""

    def __init__(self) -> None:
        super().__init__()
        records = []
        for i, whole in enumerate(map(self.manifest.record, range(7))):
            (info,) = whole.labels
            more = {5: ((0, 0, 1),)} if i in (1, 4) else {9: ((4, 4, 4),)} if i == 3 else {}
            for value, (place,) in more.items():
                self.labels[whole.volume_id][0][place] = value
            info = replace(
                info,
                values=(*info.values, *more),
                voxels=(*info.voxels, *(1 for _ in more)),
                points=(*info.points, *more.values()),
            )
            records.append(replace(whole, labels=(info,)))
        self._manifest = Manifest.from_records(records, {"name": "rare"})


def _centre_classes(source: ArraySource, spec: StreamSpec) -> np.ndarray:
    plan = Plan(source.manifest, spec, select(source.manifest, spec))
    cuts = [cut for k in range(100) for group in plan.reads(k) for cut in group]
    return np.array([source.labels[cut.crop.volume_id][0][cut.centre] for cut in cuts])


@pytest.mark.parametrize("cuts", [1, 3])
def test_a_rare_class_is_in_the_centre_as_often_as_any_other(cuts: int) -> None:
    source = _Rare()
    spec = StreamSpec(4, 12, (1, 1, 1), lanes=12, crops_per_visit=cuts, label="organs", class_balance=1.0)
    by_volume = _centre_classes(source, spec)
    assert (by_volume == 9).mean() == pytest.approx(1 / 21, abs=0.02), "one volume of seven, one class of three"
    evenly = _centre_classes(source, replace(spec, class_draw="all"))
    for value in (1, 2, 5, 9):
        assert (evenly == value).mean() == pytest.approx(1 / 4, abs=0.04), value
    half = _centre_classes(source, replace(spec, class_draw="all", class_balance=0.5))
    assert (half == 9).mean() == pytest.approx(1 / 8, abs=0.03)


def test_crops_of_all_classes_are_the_same_for_any_ranks_and_from_any_start() -> None:
    source = _Rare()
    spec = StreamSpec(4, 12, (3, 3, 3), lanes=12, label="organs", class_balance=0.8, class_draw="all")
    with CropStream(source, spec) as stream:
        whole = [next(stream) for _ in range(4)]
    for rank in range(3):
        with CropStream(source, spec, rank=rank, world=3, start=24) as stream:
            for expected in whole[2:]:
                batch = next(stream)
                own = np.isin(expected.sample_B, batch.sample_B)
                for name in ("image_BCDHW", "label_BDHW", "start_B3", "volume_B", "centre_B3"):
                    assert np.array_equal(getattr(batch, name), getattr(expected, name)[own]), name
    inside = (whole[0].centre_B3 >= whole[0].start_B3) & (whole[0].centre_B3 < whole[0].start_B3 + 3)  # type: ignore[operator]
    assert inside.all()


def test_a_digest_of_an_order_is_what_it_was_before_classes_could_be_drawn_from_all() -> None:
    """It is in checkpoints of pre-trainings, which go on from them only where it agrees."""
    source = ArraySource()
    indices = select(source.manifest, SPEC)
    assert order_digest(SPEC, indices) == ORDER_DIGEST
    with_all = replace(SPEC, label="organs", class_balance=0.5)
    assert order_digest(with_all, indices) != order_digest(replace(with_all, class_draw="all"), indices)


ORDER_DIGEST = "76c72313759b2795765ad284cfeb3ef273c54dae1ce4ef7acfe36f87bf089f8c"


def test_facts_of_a_batch() -> None:
    source = ArraySource(channels=2)
    with CropStream(source, SPEC, rank=1, world=3) as stream:
        batch = next(stream)
    assert batch.image_BCDHW.shape == (4, 2, 6, 7, 8)
    assert batch.image_BCDHW.dtype == np.int16
    assert batch.sample_B.tolist() == [1, 4, 7, 10]
    assert batch.label_BDHW is None
    assert batch.stats_BCS.shape == (4, 2, len(STATS_ORDER))
    kinds = (batch.start_B3, batch.volume_B, batch.sample_B)
    assert {a.dtype for a in kinds} == {np.dtype("int64")}
    assert {a.dtype for a in (batch.scale_B, batch.offset_B, batch.stats_BCS)} == {np.dtype("float32")}
    assert {a.dtype for a in (batch.shape_B3, batch.spacing_B3)} == {np.dtype("float64")}
    assert batch.scale_B.tolist() == [1.0 + v for v in batch.volume_B.tolist()]


def test_volumes_of_different_dtype_share_one_that_holds_both() -> None:
    source = ArraySource(dtypes=("int16", "float16"))
    with CropStream(source, SPEC) as stream:
        batch = next(stream)
    assert batch.image_BCDHW.dtype == np.float32
    for b in range(12):
        name = source.manifest.record(int(batch.volume_B[b])).volume_id
        expected = source.read_many([Crop(name, tuple(batch.start_B3[b].tolist()), SPEC.crop_DHW)])[0]
        assert np.array_equal(batch.image_BCDHW[b], expected)


def test_explicit_indices_are_the_volumes_of_the_stream() -> None:
    source = ArraySource()
    spec = StreamSpec(4, 12, (3, 4, 5), lanes=12, indices=(5, 2), split="nowhere")
    with CropStream(source, spec) as stream:
        assert {int(v) for _ in range(4) for v in next(stream).volume_B} == {2, 5}


def test_state_counts_what_the_trainer_consumed_and_not_what_was_fetched() -> None:
    with CropStream(ArraySource(), SPEC, start=24, prefetch=8) as stream:
        assert stream.state_dict() == {"seed": 5, "next": 24}
        first = next(stream)
        assert stream.state_dict()["next"] == 24, "the batch in hand is not consumed"
        second = next(stream)
        assert stream.state_dict()["next"] == 36, "asking for a batch consumes the one before"
        third = next(stream)
        stream.consumed(first)
        assert stream.state_dict()["next"] == 36, "once told, what was asked for counts no more"
        stream.consumed(second)
        stream.consumed(third)
        next(stream)
        assert stream.state_dict()["next"] == 60


class Broken(ArraySource):
    """Fails in ways that a store should not."""

    error: Exception | None = None

    def read_many(self, crops: Sequence[Crop], label: str | None = None) -> list[np.ndarray]:
        if self.error is not None:
            raise self.error
        return [np.zeros((1, 1, 1, 1), np.int16) for _ in crops]


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (ValueError("odd"), StoreError, "ValueError: odd"),
        (CorruptChunk("object 17", expected="a checksum"), CorruptChunk, "object 17"),
        (None, StoreError, r"expected shape \(1, 6, 7, 8\)"),
    ],
)
def test_errors_that_name_no_volume_are_given_their_names(error: Exception | None, kind: type, words: str) -> None:
    source = Broken()
    source.error = error
    with CropStream(source, SPEC) as stream:
        with pytest.raises(kind, match=words) as caught:
            next(stream)
        assert "vol-00" in str(caught.value)


class Stuck(ArraySource):
    """Reads only once let go."""

    def __init__(self) -> None:
        super().__init__()
        self.go, self.reading = threading.Event(), threading.Event()

    def read_many(self, crops: Sequence[Crop], label: str | None = None) -> list[np.ndarray]:
        self.reading.set()
        self.go.wait(120)
        return super().read_many(crops, label)


def test_a_waiting_consumer_can_be_interrupted() -> None:
    source = Stuck()
    with CropStream(source, SPEC) as stream:
        main = threading.main_thread().ident
        assert main is not None
        soon = threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT))
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            # On a busy machine it may come before the wait has begun, but not before this line.
            (soon.start(), next(stream))
        assert time.monotonic() - began < 60
        source.go.set()
        assert next(stream).sample_B[0] == 0, "an interrupted wait loses nothing"


def test_close_from_another_thread_wakes_the_consumer() -> None:
    source = Stuck()
    stream = CropStream(source, SPEC)
    threading.Timer(0.2, lambda: (source.go.set(), stream.close())).start()  # type: ignore[func-returns-value]
    with pytest.raises(ClosedError):
        list(stream)


def test_close_says_so_when_a_read_does_not_end() -> None:
    source = Stuck()
    stream = CropStream(source, SPEC)
    assert source.reading.wait(60)
    with pytest.raises(StoreError, match="still going on"):
        stream.close(timeout_s=0.1)
    source.go.set()
    stream.close()
    with pytest.raises(ClosedError):
        next(stream)


def test_close_takes_its_time_once_and_not_once_a_thread() -> None:
    source = Stuck()
    stream = CropStream(source, SPEC, threads=16, prefetch=16)
    assert source.reading.wait(60)
    began = time.monotonic()
    with pytest.raises(StoreError, match="still going on"):
        stream.close(timeout_s=1.0)
    assert time.monotonic() - began < 10
    source.go.set()
    stream.close()


def test_a_read_that_does_not_end_hides_no_earlier_error(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Stuck()
    stream = CropStream(source, SPEC)
    assert source.reading.wait(60)
    monkeypatch.setattr(stream, "close", partial(stream.close, timeout_s=0.1))
    with pytest.raises(CorruptChunk, match="object 17"), stream:
        raise CorruptChunk("object 17")
    source.go.set()
    CropStream.close(stream)


@pytest.mark.parametrize(
    ("change", "arguments", "thing"),
    [
        ({"lanes": 10}, {"world": 4, "rank": 0}, "lanes"),
        ({"global_batch": 10}, {"world": 4, "rank": 0}, "global_batch"),
        ({"crop_DHW": (0, 4, 4)}, {}, "crop_DHW"),
        ({"foreground": 1.5}, {}, "foreground"),
        ({"class_balance": 0.5}, {}, "class_balance"),
        ({"split": "test"}, {}, "stream"),
        ({"label": "lesions"}, {}, "stream"),
        ({"indices": ()}, {}, "indices"),
        ({"indices": (1, 1)}, {}, "indices"),
        ({"indices": (99,)}, {}, "indices"),
        ({}, {"start": -1}, "crop stream"),
        ({}, {"prefetch": 0}, "crop stream"),
    ],
)
def test_wrong_settings_are_named(change: dict[str, Any], arguments: dict[str, int], thing: str) -> None:
    before = threading.active_count()
    with pytest.raises(ConfigError) as caught:
        CropStream(ArraySource(), StreamSpec(**{**vars(SPEC), **change}), **arguments)
    assert caught.value.thing == thing
    assert threading.active_count() == before


def test_volumes_of_different_channel_count_are_refused_by_name() -> None:
    source = ArraySource()
    records = [*source.manifest.records(), record("vol-100", (9, 9, 9), channels=3, split="train")]
    source._manifest = Manifest.from_records(records)
    source.arrays["vol-100"] = np.zeros((3, 9, 9, 9), np.int16)
    with CropStream(source, SPEC) as stream, pytest.raises(ConfigError, match="3 in vol-100"):
        list(stream)


def test_a_second_loop_goes_on_where_the_first_stopped() -> None:
    with CropStream(ArraySource(), SPEC) as stream:
        for batch in stream:
            assert rows(batch)[0][0] == 0
            break
        for batch in stream:
            assert rows(batch)[0][0] == SPEC.global_batch
            break
