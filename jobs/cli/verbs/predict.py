"""evaluate; predict."""

import argparse
import sys
from pathlib import Path
from typing import Any

from jobs.cli.verbs.common import MODEL, add_json, add_state, job_address, use_stack
from jobs.output import emit
from storage.errors import ConfigError, RefusedInput


def add(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the verbs."""
    evaluate = verbs.add_parser("evaluate", help="score a model on a split of a store, case by case")
    evaluate.add_argument("model", help=MODEL)
    evaluate.add_argument("data", help="URL of a store with labels, or with the column that a classifier learned")
    evaluate.add_argument("--split", default="test", help="split of the manifest (default: test)")
    evaluate.add_argument("--label", help="name of the label map (default: label)")
    _add_inference(evaluate)
    evaluate.add_argument("--tolerance-mm", type=float, help="tolerance of the NSD (default: 1)")
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
    from jobs.predict.evaluation import of_heads, of_masks, opened
    from jobs.tracking.encoder import bundle_of
    from ssl_core.portable.card import with_article

    tolerance_mm = 1.0 if arguments.tolerance_mm is None else arguments.tolerance_mm
    if not tolerance_mm > 0:
        raise ConfigError(
            "--tolerance-mm", expected="millimetres, above 0", found=f"{tolerance_mm:g}", remedy="leave it out"
        )
    use_stack(arguments)
    data, split = arguments.data, arguments.split
    manifest = opened(data, split, arguments.label)
    with bundle_of(arguments.model) as bundle:
        predictor = _predictor(arguments, bundle)
        if predictor.head is not None:
            _refuse_for_heads(arguments, predictor.kind, "label", "tolerance_mm", "mirror")
            result, text = of_heads(predictor, data, manifest, split, force=arguments.force)
        elif predictor.kind == "segmenter":
            label = "label" if arguments.label is None else arguments.label
            result, text = of_masks(predictor, data, manifest, split, label, tolerance_mm, force=arguments.force)
        else:
            raise ConfigError(
                f"model {arguments.model}",
                expected="a segmenter, a classifier or a regressor",
                found=with_article(predictor.kind),
                remedy="fine-tune it first (`tomoscale finetune`)",
            )
    emit(result, arguments.json, text)
    return 0


def _refuse_for_heads(arguments: argparse.Namespace, kind: str, *names: str) -> None:
    """Options of masks mean nothing to a model of whole scans."""
    for name in names:
        if getattr(arguments, name) is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')}",
                expected="a segmenter",
                found=f"kind {kind}",
                remedy="leave it out: a class or a number is of the windows as they are",
            )


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
            _refuse_for_heads(arguments, predictor.kind, "mirror")
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
