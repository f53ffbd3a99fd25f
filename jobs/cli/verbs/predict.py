"""evaluate; predict."""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from jobs.cli.verbs.common import MODEL, add_json, add_state, job_address, use_stack
from jobs.output import Progress, emit, table
from storage.errors import ConfigError, RefusedInput

_LEAVE_OUT = "leave it out: a class or a number is of the windows as they are"


def add(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the verbs."""
    evaluate = verbs.add_parser("evaluate", help="score a segmenter on a split of a store, case by case")
    evaluate.add_argument("model", help=MODEL)
    evaluate.add_argument("data", help="URL of a store with labels")
    evaluate.add_argument("--split", default="test", help="split of the manifest (default: test)")
    evaluate.add_argument("--label", default="label", help="name of the label map (default: label)")
    _add_inference(evaluate)
    evaluate.add_argument("--tolerance-mm", type=float, default=1.0, help="tolerance of the NSD (default: 1)")
    add_json(evaluate)
    add_state(evaluate)
    evaluate.set_defaults(run=_evaluate)

    predict = verbs.add_parser(
        "predict", help="segment scans into masks, or write classes or numbers of them to a table"
    )
    predict.add_argument("model", help=MODEL)
    predict.add_argument(
        "input", help="a file (NIfTI, NRRD, MHA, MGZ), a DICOM series, a folder of either, or the URL of a store"
    )
    predict.add_argument(
        "output",
        help="a mask (.nii, .nii.gz; .dcm, a DICOM segmentation, of a DICOM series), a folder for several, or a URL, to"
        " which a job of the cluster writes; of a classifier or a regressor a table (.csv) with a row a scan",
    )
    predict.add_argument("--probabilities", action="store_true", help="write NAME-probabilities.nii.gz too")
    predict.add_argument("--features", action="store_true", help="write NAME-features.npz too; NAME.npz of an encoder")
    predict.add_argument("--overlay", action="store_true", help="write NAME-overlay.png too")
    predict.add_argument("--nifti", action="store_true", help="in a folder: masks of DICOM series as NIfTI")
    predict.add_argument("--split", help="of a store: only this split (default: all)")
    predict.add_argument("--volume", metavar="ID", help="of a store: only this volume")
    predict.add_argument(
        "--overwrite", action="store_true", help="replace what is there; without, masks in a folder are left"
    )
    _add_inference(predict)
    predict.add_argument("--address", metavar="URL", help="of a job: job server; the local stack's when empty")
    predict.add_argument("--cpus", type=int, default=4, help="of a job: CPUs of each task (default: 4)")
    predict.add_argument("--gpus", type=int, default=0, help="of a job: GPUs of each task (default: 0)")
    add_state(predict)
    predict.set_defaults(run=_predict)


def _add_inference(verb: argparse.ArgumentParser) -> None:
    text = "predict what is far from all that the model learned from (spacing, field of view, intensities), with a note"
    verb.add_argument("--force", action="store_true", help=text)
    verb.add_argument(
        "--mirror",
        metavar="AXES",
        help="average windows mirrored along D,H,W or some; none (default: as the bundle says)",
    )
    verb.add_argument(
        "--largest-component",
        metavar="LABELS",
        help="leave only the largest component of these labels: names, values, all, none (default: as the bundle says)",
    )
    verb.add_argument("--batch", type=int, default=4, help="windows computed at once (default: 4)")


def _evaluate(arguments: argparse.Namespace) -> int:
    from jobs.tracking.encoder import bundle_of
    from ssl_core.downstream.scores import METRICS, CaseScore, mean_scores, score_case
    from storage.format.manifest import Manifest
    from storage.reading.slabs import StoredSlabs
    from storage.reading.volume_store import VolumeStore

    if not arguments.tolerance_mm > 0:
        raise ConfigError(
            "--tolerance-mm",
            expected="millimetres, above 0",
            found=f"{arguments.tolerance_mm:g}",
            remedy="leave it out",
        )
    use_stack(arguments)
    manifest = Manifest.open(arguments.data)
    indices = manifest.select(split=arguments.split, labelled=arguments.label).tolist()
    if not indices:
        raise ConfigError(
            f"split {arguments.split!r} of {arguments.data}",
            expected=f"volumes with label {arguments.label!r}",
            found="none",
            remedy="`tomoscale data show URL` lists splits and labels",
        )
    cases: list[CaseScore] = []
    with bundle_of(arguments.model) as bundle:
        predictor = _segmenter(arguments, bundle)
        names = {value: name for value, name in predictor.plan.labels if value != 0}
        store = VolumeStore(arguments.data, manifest)
        bar = Progress("evaluate", len(indices), "cases")
        for done, index in enumerate(indices, 1):
            record = manifest.record(index)
            mask = predictor.segment(
                StoredSlabs(store, record.volume_id),
                np.array(record.affine).reshape(4, 4),
                record.stats,
                name=record.volume_id,
                modality=record.modality,
                force=arguments.force,
            )
            truth = store.read_volume(record.volume_id, label=arguments.label)[0]
            scores = score_case(
                mask, truth, labels=names, spacing_mm=record.spacing_mm, tolerance_mm=arguments.tolerance_mm
            )
            cases += [CaseScore(record.volume_id, record.subject, label, s) for label, s in scores.items()]
            bar.update(done)
        store.close()
    groups = [("mean", label, mean_scores([c for c in cases if c.label == label])) for label in names.values()]
    rows = [(c.volume_id, c.label, c.scores) for c in cases] + groups
    header = ("case", "label", *(metric.heading(arguments.tolerance_mm) for metric in METRICS))
    emit(
        {
            "split": f"{manifest.fingerprint} {arguments.split}",
            "cases": [{"volume_id": c.volume_id, "label": c.label, **asdict(c.scores)} for c in cases],
        },
        arguments.json,
        table(header, [(case, label, *(scores.of(metric) for metric in METRICS)) for case, label, scores in rows]),
    )
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    from jobs.predict import run
    from jobs.predict import table as results
    from jobs.predict.outputs import Choice
    from jobs.tracking.encoder import bundle_of

    if "://" in arguments.output:
        return _submit(arguments)
    source, output = arguments.input, Path(arguments.output)
    run.check_places(source, output)
    choice = Choice(arguments.probabilities, arguments.features, arguments.overlay, arguments.nifti, arguments.force)
    whole = {"overwrite": arguments.overwrite, "split": arguments.split, "volume": arguments.volume}
    one = run.is_file_output(source, output)
    is_table = output.suffix.lower() == results.ENDING
    if one and not is_table and Path(source).is_file():  # before a model is fetched
        run.check_file(Path(source), output, overwrite=arguments.overwrite)
    use_stack(arguments)
    with bundle_of(arguments.model) as bundle:
        predictor = _predictor(arguments, bundle)
        if predictor.head is not None or is_table:
            results.check(predictor, arguments.model, source, output, choice, overwrite=arguments.overwrite)
            if arguments.mirror is not None:
                raise ConfigError("--mirror", expected="a segmenter", found=f"kind {predictor.kind}", remedy=_LEAVE_OUT)
            places = {"split": arguments.split, "volume": arguments.volume}
            done, refused = results.to_table(predictor, source, output, choice, _note, **places)
            print(f"{output}: {done} of {done + len(refused)} scans", file=sys.stderr)
            return RefusedInput.exit_code if refused else 0
        if one:
            counts = run.to_file(predictor, arguments.model, source, output, choice, _note, **whole)
            print(f"{output}: voxels {counts}" if counts else str(output), file=sys.stderr)
            return 0
        done, refused = run.to_folder(predictor, arguments.model, bundle, source, output, choice, _note, **whole)
    print(f"{output}: {done} of {done + len(refused)} scans", file=sys.stderr)
    return RefusedInput.exit_code if refused else 0


def _submit(arguments: argparse.Namespace) -> int:
    """Send a batch of predictions to the cluster, and follow it."""
    local = ("probabilities", "features", "overlay", "nifti", "volume", "overwrite", "mirror", "largest_component")
    odd = [name for name in local if getattr(arguments, name)]
    if odd:
        raise ConfigError(
            f"--{odd[0].replace('_', '-')}",
            expected="an output on this machine",
            found=arguments.output,
            remedy="leave it out: a job writes masks as the bundle makes them",
        )
    from jobs import submit
    from jobs.predict.config import PredictJobConfig
    from ssl_core.config import parse

    names = ("model", "split", "force", "cpus", "gpus")
    values = {name: getattr(arguments, name) for name in names}
    config = parse(PredictJobConfig, {**values, "scans": arguments.input, "masks": arguments.output}, "predict")
    use_stack(arguments)
    submit.run(job_address(arguments), "jobs.predict", config, "predict", show=lambda line: print(line, flush=True))
    return 0


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _predictor(arguments: argparse.Namespace, bundle: Path) -> Any:
    from ssl_core.portable import Predictor
    from ssl_core.portable.inference.settings import axes_of, values_of

    plain = Predictor(bundle, report=_note)
    if arguments.mirror is None and arguments.largest_component is None and arguments.batch == plain.batch:
        return plain
    return Predictor(
        bundle,
        report=_note,
        batch=arguments.batch,
        mirror=None if arguments.mirror is None else axes_of(arguments.mirror),
        largest_component=None
        if arguments.largest_component is None
        else values_of(arguments.largest_component, plain.plan.labels, "--largest-component"),
    )


def _segmenter(arguments: argparse.Namespace, bundle: Path) -> Any:
    from ssl_core.portable.card import with_article

    predictor = _predictor(arguments, bundle)
    if predictor.kind != "segmenter":
        raise ConfigError(
            f"model {arguments.model}",
            expected="a segmenter",
            found=with_article(predictor.kind),
            remedy="fine-tune it first (`tomoscale finetune`)",
        )
    return predictor
