"""The main job, end to end on real parts: volumes in, a registered segmenter and a report out."""

import os
import platform
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from cluster import services, stack
from jobs import driver as entry
from jobs import submit
from jobs.configs import FinetuneJobConfig, LabelledConfig, PretrainConfig, TuneConfig
from jobs.demo import presets
from jobs.ingest import ingest
from jobs.labelled import draw
from jobs.output import to_json, write_page
from jobs.pages import report
from jobs.tracking import runs as tracking
from ssl_core.config import dump_yaml, parse
from storage.datasets import simulated as cohort
from storage.errors import ConfigError, RefusedInput, TomoscaleError
from storage.format.manifest import Manifest
from storage.ingest.pipeline import IngestReport

LABEL = "label"


class Memory:
    """Watches the resident memory of the stack and this process from a thread; shared pages count once a process."""

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
        while not self._stop.wait(3.0):
            with suppress(TomoscaleError, psutil.Error):
                used = sum(service.resident_mb for service in stack.status(self._state).services) / 1e3
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
            found = ingest(str(folder), url, say=self.say)
        _refuse_too_few_labels(found.manifest, url)
        configs: dict[str, Any] = {}
        runs = "s3://runs"
        pre = parse(PretrainConfig, presets.pretrain(f"demo-{stamp}", url, runs))
        with self._stage("pre-training"):
            submit.run(address, "jobs.pretrain", pre, pre.name, show=self.say)
        configs["pretrain"] = pre
        encoder = f"models:/{pre.model_name}@candidate"
        tune = parse(TuneConfig, presets.tune(f"search-{stamp}", url, LABEL, runs, encoder))
        with self._stage("search"):
            submit.run(address, "jobs.tune", tune, tune.name, show=self.say)
        searched = entry.read_result(runs, tune.name)
        configs["tune"] = tune
        plan = presets.finetune(f"finetune-{stamp}", url, LABEL, runs, encoder, searched["best"])
        fine = parse(FinetuneJobConfig, plan)
        with self._stage("fine-tuning and evaluation"):
            submit.run(address, "jobs.finetune", fine, fine.name, show=self.say)
        tuned = entry.read_result(runs, fine.name)
        configs["finetune"] = fine
        with self._stage("prediction from the registry"):
            predicted, previews, captions = self._predict(url, folder, tuned)
        with self._stage("report"):
            views, caption = _views_picture(pre)
        summary = self._summary(title, simulated, url, found, pre, searched, tuned, predicted, configs)
        page = self.out / "report.html"
        write_page(page, report.render(summary, {"views": views, **previews}, {"views": caption, **captions}))
        write_page(self.out / "summary.json", to_json(summary))
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
        self, url: str, folder: Path, tuned: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, bytes], dict[str, str]]:
        """Pull the segmenter by alias, predict raw NIfTI files of the best, the median and the worst test case."""
        import nibabel

        from jobs.pages.pictures import overlay_picture
        from jobs.tracking import models as registry
        from ssl_core.portable import Predictor
        from ssl_core.portable.geometry import to_canonical
        from storage.reading.volume_store import VolumeStore

        uri = f"models:/{tuned['model']}@candidate"
        if self._pulled.exists():
            shutil.rmtree(self._pulled)
        predictor = Predictor(registry.pull(uri, self._pulled))
        manifest = Manifest.open(url)
        store = VolumeStore(url, manifest)
        seed = min(c["seed"] for c in tuned["cases"])
        mine = [c for c in tuned["cases"] if c["start"] == tuned["registered_start"] and c["seed"] == seed]
        score = {
            v: float(np.mean([c["dice"] for c in mine if c["volume_id"] == v])) for v in {c["volume_id"] for c in mine}
        }
        ranked = sorted(score, key=lambda v: score[v])
        chosen = {"best": ranked[-1], "median": ranked[len(ranked) // 2], "worst": ranked[0]}
        previews, captions, facts = {}, {}, {}
        for rank, volume in chosen.items():
            record = manifest.record(manifest.index_of(volume))
            source, written = folder / record.source, self.out / f"prediction-{rank}.nii.gz"
            predictor.predict_file(source, written)
            image, mask = nibabel.load(source), nibabel.load(written)
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
            captions[f"preview-{rank}"] = (
                f"{rank} test case of the registered model, {volume}: Dice {score[volume]:.3f}"
            )
            facts |= {rank: {"input": str(source), "output": str(written.resolve()), "dice": score[volume]}}
        store.close()
        return {"model": uri, "same_geometry": True, **facts["median"], "cases": facts}, previews, captions

    def _summary(
        self,
        title: str,
        simulated: bool,
        url: str,
        found: IngestReport,
        pre: PretrainConfig,
        searched: dict[str, Any],
        tuned: dict[str, Any],
        predicted: dict[str, Any],
        configs: dict[str, Any],
    ) -> dict[str, Any]:
        points = tracking.points_of(pre.experiment, pre.name)
        late = [m for _, _, m in points if "time/wait_share" in m][1:] or [points[-1][2]]
        manifest = Manifest.open(url)
        tracking_uri = os.environ["MLFLOW_TRACKING_URI"]
        run_id, experiment = tracking.find_run(tracking.client(), pre.experiment, pre.name)
        run_url = f"{tracking_uri}/#/experiments/{experiment}/runs/{run_id}"
        orphans = [str(o) for o in found.orphans]
        quarantined = [str(q) for q in found.quarantined]
        splits = {s: len(manifest.select(split=s)) for s in ("train", "val", "test")}
        shares = ", ".join(f"{name} {count}" for name, count in splits.items())
        stopped = sum(t["stopped_early"] for t in searched["trials"])
        starts = {r["start"]: [] for r in tuned["rows"]}
        for row in tuned["rows"]:
            starts[row["start"]].append(row["dice_mean"])
        return {
            "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "headline": {
                "volumes ingested": len(manifest),
                **{f"test Dice, {s}": f"{np.mean(v):.3f}" for s, v in starts.items()},
                "trials stopped early": f"{stopped} of {len(searched['trials'])}",
                "minutes in all": f"{sum(self.timings.values()) / 60:.1f}",
                "GB resident at most": f"{self.memory.peak_gb if self.memory else 0:.1f}",
            },
            "data": {
                "description": f"{len(manifest)} simulated volumes"
                if simulated
                else f"{title}: {len(manifest)} volumes",
                "simulated": simulated,
                "text": f"{len(manifest)} volumes published to {url}; splits by subject: {shares}.",
                "notes": orphans + quarantined,
                "facts": {"store": url, "manifest fingerprint": manifest.fingerprint, **splits},
            },
            "pretrain": {
                "method": pre.method_name,
                "steps": pre.engine.steps,
                "global_batch": pre.stream.global_batch,
                "workers": pre.cluster.workers,
                "points": points,
                "samples_per_s": float(np.median([m["time/samples_per_s"] for m in late])),
                "wait_share": float(np.median([m["time/wait_share"] for m in late])),
                "run_id": run_id,
                "run_url": run_url,
                "model": f"models:/{pre.model_name}@candidate",
            },
            "search": searched,
            "finetune": tuned,
            "predict": predicted,
            "timings": self.timings,
            "links": {
                "MLflow": tracking_uri,
                "pre-training run": run_url,
                "Ray dashboard": os.environ.get("RAY_API_SERVER_ADDRESS", ""),
            },
            "environment": {
                "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}",
                "python": platform.python_version(),
                **{name: version(name) for name in ("tomoscale", "torch", "monai", "ray", "mlflow", "zarr", "numpy")},
            },
            "config": "\n---\n".join(f"# {kind}\n{dump_yaml(c)}" for kind, c in configs.items()),
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
    wanted = parse(LabelledConfig, presets.labelled(url, LABEL))
    try:
        draw(manifest, wanted)
    except RefusedInput as error:
        raise RefusedInput(
            error.thing,
            expected=error.expected,
            found=error.found,
            remedy="give a folder with more labelled subjects; to pre-train alone, or fine-tune on fewer, use"
            " `tomoscale pretrain` and `tomoscale finetune` with `labelled.subjects`",
        ) from error


def _views_picture(pre: PretrainConfig) -> tuple[bytes, str]:
    """Two views of the first sample that the job saw, and what they share."""
    from jobs.pages.pictures import views_picture
    from jobs.pretrain.inputs import stream_spec
    from ssl_core.methods.base import method_class
    from ssl_core.views.make import make_views
    from storage.reading.volume_store import VolumeStore
    from storage.stream.crop_stream import CropStream

    manifest = Manifest.open(pre.data)
    spec = method_class(pre.method_name).view_spec(pre.method_config)
    store = VolumeStore(pre.data, manifest)
    with CropStream(store, stream_spec(pre)) as stream:
        batch = next(iter(stream))
    views = make_views(batch, spec, seed=pre.engine.seed, policy=pre.intensity)
    store.close()
    first, second = views.roles["global"][:2]
    record = manifest.record(int(batch.volume_B[0]))
    volume = record.volume_id
    return views_picture(
        first, second, shape_DHW=record.shape_DHW, spacing_mm=record.spacing_mm
    ), f"Sample 0 of the stream, volume {volume}, as the method saw it."
