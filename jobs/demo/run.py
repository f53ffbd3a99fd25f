"""The main job, end to end on real parts: volumes in, a registered segmenter and a report out."""

import os
import platform
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import cast

import nibabel
import numpy as np
import psutil
from nibabel.spatialimages import SpatialImage

from cluster import services, stack, stack_info
from jobs import driver, submit
from jobs.configs import FinetuneJobConfig, LabelledConfig, PretrainConfig
from jobs.configs.search import TuneConfig
from jobs.demo import presets
from jobs.ingestion import ingest
from jobs.labelled import draw
from jobs.output import to_json, write_page
from jobs.pages import report
from jobs.pages.pictures import overlay_picture, views_picture
from jobs.pages.summary import DataFacts, DemoSummary, PredictedCase, Predictions, PretrainFacts
from jobs.pretrain.inputs import stream_spec
from jobs.tracking import models as registry
from jobs.tracking import runs as tracking
from ssl_core.config import Config, dump_yaml, parse
from ssl_core.downstream.comparison import Comparison
from ssl_core.downstream.scores import dice_by_volume
from ssl_core.downstream.search import SearchResult
from ssl_core.methods.base import method_class
from ssl_core.portable import Predictor
from ssl_core.portable.geometry import to_canonical
from ssl_core.views.make import make_views
from storage.datasets import simulated as cohort
from storage.errors import ConfigError, RefusedInput, TomoscaleError
from storage.format.manifest import Manifest
from storage.ingest.pipeline import IngestReport
from storage.reading.volume_store import VolumeStore
from storage.stream.crop_stream import CropStream

LABEL = "label"
NO_ANSWER = (
    "The demo shows the path in minutes. It cannot show whether pre-training helps: that takes longer pre-training, and"
    " draws of\nlabelled subjects. `tomoscale study` asks it (docs/how-to-study.md)."
)


class Memory:
    """Watches the resident memory of the stack and this process from a thread; shared pages count in proportion."""

    def __init__(self, state: Path) -> None:
        self.peak_gb = 0.0
        self._state, self._stop = state, threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(5.0):
            with suppress(TomoscaleError, psutil.Error):
                used = stack_info.stack_mb(self._state) / 1e3
                self.peak_gb = max(self.peak_gb, used + psutil.Process().memory_info().rss / 1e9)


@dataclass
class Demo:
    """One run of the demo.

    Attributes:
        out: Folder of the report.
        state: Folder of the local stack.
        data: Folder of volumes; the data sets of $TOMOSCALE_DATASETS or the simulated cohort when None.
        store: URL to ingest to; a bucket of the local stack when None.
        keep: Whether the stack stays up.
        say: Hears every line.
    """

    out: Path
    state: Path
    data: Path | None = None
    store: str | None = None
    keep: bool = False
    say: Callable[[str], None] = print
    timings: dict[str, float] = field(default_factory=dict)
    memory: Memory | None = None

    @property
    def _pulled(self) -> Path:
        return self.out / "model"

    def run(self) -> Path:
        """Everything; returns the path of the report."""
        if self.data is not None and not self.data.is_dir():
            raise ConfigError(
                f"--data {self.data}",
                expected="a folder of volumes",
                found="a file" if self.data.exists() else "no folder",
                remedy="give the folder that holds images/ and labels/",
            )
        if self._pulled.exists() and not (self._pulled / "bundle.json").is_file():
            raise ConfigError(
                str(self._pulled),
                expected="nothing, or the model of an earlier demo, which is replaced",
                found="something else",
                remedy="move it away or give another --out",
            )
        self.out.mkdir(parents=True, exist_ok=True)
        running = stack.status(self.state).running
        if running:
            self.say(f"using the stack that is up in {self.state}")
        try:
            self.say(NO_ANSWER)
            with self._stage("stack"):
                info = stack.up(self.state, progress=self.say)
            for key in services.UNSET:
                os.environ.pop(key, None)
            os.environ.update(stack.environment(self.state))
            self.memory = Memory(self.state)
            page = self._work(info.jobs_address)
        finally:
            if self.memory is not None:
                self.memory.close()
            if not (self.keep or running):
                with suppress(OSError):  # Ctrl-C ends `| tee` first, and the stack must not be left for that
                    self.say("\n== down")
                stack.down(self.state, progress=self.say)
        self.say(f"\nreport:  {page.resolve()}\nsummary: {(self.out / 'summary.json').resolve()}")
        return page

    def _work(self, address: str) -> Path:
        stamp = datetime.now(UTC).strftime("%m%d-%H%M%S")
        folder, title, simulated = self._dataset()
        url = self.store or f"s3://volumes/{title}"
        with self._stage("ingest"):
            ingested = ingest(str(folder), url, say=self.say)
        _refuse_too_few_labels(ingested.manifest, url)
        runs = "s3://runs"
        pre = parse(PretrainConfig, presets.pretrain(f"demo-{stamp}", url, runs))
        with self._stage("pre-training"):
            submit.run(address, "jobs.pretrain", pre, pre.name, show=self.say)
        encoder = f"models:/{pre.model_name}@candidate"
        tune = parse(TuneConfig, presets.tune(f"search-{stamp}", url, LABEL, runs, encoder))
        with self._stage("search"):
            submit.run(address, "jobs.tune", tune, tune.name, show=self.say)
        search = SearchResult.from_json(driver.read_result(runs, tune.name))
        plan = presets.finetune(f"finetune-{stamp}", url, LABEL, runs, encoder, search.best)
        fine = parse(FinetuneJobConfig, plan)
        with self._stage("fine-tuning and evaluation"):
            submit.run(address, "jobs.finetune", fine, fine.name, show=self.say)
        comparison = Comparison.from_json(driver.read_result(runs, fine.name))
        with self._stage("prediction from the registry"):
            predictions, previews, captions = self._predict(url, folder, comparison)
        with self._stage("report"):
            views, caption = _views_picture(pre)
        volumes = len(Manifest.open(url))
        summary = DemoSummary(
            created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            headline=self._headline(volumes, search, comparison),
            data=_data_facts(title, simulated, url, ingested),
            pretrain=_pretrain_facts(pre),
            search=search,
            finetune=comparison,
            predict=predictions,
            timings=self.timings,
            links={
                "MLflow": os.environ["MLFLOW_TRACKING_URI"],
                "pre-training run": _run_page(pre)[1],
                "Ray dashboard": os.environ.get("RAY_API_SERVER_ADDRESS", ""),
            },
            environment=_environment(),
            config=_configurations({"pretrain": pre, "tune": tune, "finetune": fine}),
        )
        page = self.out / "report.html"
        write_page(page, report.render(summary, {"views": views, **previews}, {"views": caption, **captions}))
        write_page(self.out / "summary.json", to_json(summary.to_json()))
        self.say("")
        self.say(report.text(summary))
        if simulated:
            self.say("\nThese subjects are simulated; the numbers show that the machinery works and nothing more.")
        return page

    def _dataset(self) -> tuple[Path, str, bool]:
        """Folder, short name, and whether it is simulated."""
        datasets = os.environ.get("TOMOSCALE_DATASETS")
        if self.data is not None:
            return self.data, self.data.resolve().name.replace("_", "-").lower(), False
        if datasets and (Path(datasets) / "msd_hippocampus").is_dir():
            return Path(datasets) / "msd_hippocampus", "msd-hippocampus", False
        self.say("no --data and no $TOMOSCALE_DATASETS/msd_hippocampus: making SIMULATED subjects from a head template")
        with self._stage("simulated cohort"):
            return cohort.ensure(), "simulated", True

    def _predict(
        self, url: str, folder: Path, comparison: Comparison
    ) -> tuple[Predictions, dict[str, bytes], dict[str, str]]:
        """Pull the segmenter by alias, predict raw NIfTI files of the best, the median and the worst test case."""
        uri = f"models:/{comparison.model}@candidate"
        if self._pulled.exists():
            shutil.rmtree(self._pulled)
        predictor = Predictor(registry.pull(uri, self._pulled))
        manifest = Manifest.open(url)
        dice = _registered_dice(comparison)
        ranked = sorted(dice, key=lambda volume: dice[volume])
        previews, captions, cases = {}, {}, {}
        with VolumeStore(url, manifest) as store:
            for rank, volume in (("best", ranked[-1]), ("median", ranked[len(ranked) // 2]), ("worst", ranked[0])):
                record = manifest.record(manifest.index_of(volume))
                source, written = folder / record.source, self.out / f"prediction-{rank}.nii.gz"
                predictor.predict_file(source, written, overwrite=True, force=True)
                image, mask = (cast(SpatialImage, nibabel.load(path)) for path in (source, written))
                if image.shape[:3] != mask.shape or not np.allclose(image.affine, mask.affine):
                    raise ConfigError(
                        str(written),
                        expected=f"the geometry of {source}",
                        found="another",
                        remedy="this is a fault of tomoscale: please report it with the header of that file",
                    )
                previews[f"preview-{rank}"] = overlay_picture(
                    to_canonical(str(source), np.asarray(image.dataobj), image.affine).values_CDHW[0],
                    store.read_volume(volume, label=LABEL)[0],
                    to_canonical(str(written), np.asarray(mask.dataobj), mask.affine).values_CDHW[0],
                    spacing_mm=record.spacing_mm,
                    labels=dict(predictor.plan.labels),
                )
                caption = f"{rank} test case of the registered model, {volume}: Dice {dice[volume]:.3f}"
                captions[f"preview-{rank}"] = caption
                cases[rank] = PredictedCase(str(source), str(written.resolve()), dice[volume])
        return Predictions(uri, cases), previews, captions

    def _headline(self, volumes: int, search: SearchResult, comparison: Comparison) -> dict[str, str | int]:
        starts: dict[str, list[float]] = {}
        for row in comparison.rows:
            starts.setdefault(row.start, []).append(row.mean.dice)
        stopped = sum(trial.stopped_early for trial in search.trials)
        return {
            "volumes ingested": volumes,
            **{f"test Dice, {start}": f"{np.mean(values):.3f}" for start, values in starts.items()},
            "trials stopped early": f"{stopped} of {len(search.trials)}",
            "minutes in all": f"{sum(self.timings.values()) / 60:.1f}",
            "GB resident at most": f"{self.memory.peak_gb if self.memory else 0:.1f}",
        }

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        self.say(f"\n== {name}")
        began = time.monotonic()
        yield
        self.timings[name] = time.monotonic() - began
        self.say(f"   {name}: {self.timings[name]:.1f} s")


def _refuse_too_few_labels(manifest: Manifest, url: str) -> None:
    """Now, and not after the minutes of a pre-training."""
    try:
        draw(manifest, parse(LabelledConfig, presets.labelled(url, LABEL)))
    except RefusedInput as error:
        raise RefusedInput(
            error.thing,
            expected=error.expected,
            found=error.found,
            remedy="give a folder with more labelled subjects; to pre-train alone, or fine-tune on fewer, use"
            " `tomoscale pretrain` and `tomoscale finetune` with `labelled.subjects`",
        ) from error


def _registered_dice(comparison: Comparison) -> dict[str, float]:
    """Mean Dice over labels of each test volume, of the training whose segmenter was registered."""
    registered = next(t for t in comparison.trainings if t.start == comparison.registered_start)  # its first seed
    return dice_by_volume(registered.cases)


def _data_facts(title: str, simulated: bool, url: str, ingested: IngestReport) -> DataFacts:
    manifest = Manifest.open(url)
    splits = {split: len(manifest.select(split=split)) for split in ("train", "val", "test")}
    shares = ", ".join(f"{name} {count}" for name, count in splits.items())
    return DataFacts(
        description=f"{len(manifest)} simulated volumes" if simulated else f"{title}: {len(manifest)} volumes",
        simulated=simulated,
        text=f"{len(manifest)} volumes published to {url}; splits by subject: {shares}.",
        notes=tuple(map(str, (*ingested.orphans, *ingested.quarantined))),
        facts={"store": url, "manifest fingerprint": manifest.fingerprint, **splits},
    )


def _run_page(pre: PretrainConfig) -> tuple[str, str]:
    """Id of the pre-training's run, and the address of its page."""
    run_id, experiment = tracking.find_run(tracking.client(), pre.experiment, pre.name)
    return run_id, f"{os.environ['MLFLOW_TRACKING_URI']}/#/experiments/{experiment}/runs/{run_id}"


def _pretrain_facts(pre: PretrainConfig) -> PretrainFacts:
    points = tracking.points_of(pre.experiment, pre.name)
    late = [metrics for _, _, metrics in points if "time/wait_share" in metrics][1:] or [points[-1][2]]
    run_id, address = _run_page(pre)
    return PretrainFacts(
        method=pre.method_name,
        steps=pre.engine.steps,
        global_batch=pre.stream.global_batch,
        workers=pre.cluster.workers,
        points=tuple(points),
        samples_per_s=float(np.median([metrics["time/samples_per_s"] for metrics in late])),
        wait_share=float(np.median([metrics["time/wait_share"] for metrics in late])),
        run_id=run_id,
        run_url=address,
        model=f"models:/{pre.model_name}@candidate",
    )


def _environment() -> dict[str, str]:
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{name: version(name) for name in ("tomoscale", "torch", "monai", "ray", "mlflow", "zarr", "numpy")},
    }


def _configurations(configs: Mapping[str, Config]) -> str:
    return "\n---\n".join(f"# {kind}\n{dump_yaml(config)}" for kind, config in configs.items())


def _views_picture(pre: PretrainConfig) -> tuple[bytes, str]:
    """Two views of the first sample that the job saw, and what they share."""
    manifest = Manifest.open(pre.data)
    spec = method_class(pre.method_name).view_spec(pre.method_config)
    with VolumeStore(pre.data, manifest) as store, CropStream(store, stream_spec(pre)) as stream:
        batch = next(iter(stream))
    views = make_views(batch, spec, seed=pre.engine.seed, policy=pre.intensity)
    first, second = views.roles["global"][:2]
    record = manifest.record(int(batch.volume_B[0]))
    volume = record.volume_id
    return views_picture(
        first, second, shape_DHW=record.shape_DHW, spacing_mm=record.spacing_mm
    ), f"Sample 0 of the stream, volume {volume}, as the method saw it."
