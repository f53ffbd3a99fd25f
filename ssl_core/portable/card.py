"""`bundle.json`: which files make a bundle, and whether they are what was written."""

import hashlib
import json
from pathlib import Path
from typing import Any

from .errors import RefusedInput

FORMAT = "tomoscale-bundle/1"
WITH_INFERENCE = "tomoscale-bundle/2"
"""Of bundles whose `preprocess.json` says `inference`: code of before would leave that out and predict otherwise."""
WITH_HEAD = "tomoscale-bundle/3"
"""Of classifiers and regressors, whose head code of before does not know."""
FORMATS = (FORMAT, WITH_INFERENCE, WITH_HEAD)
KINDS = ("segmenter", "encoder", "classifier", "regressor")
NEEDED = {"weights.safetensors", "architecture.json", "preprocess.json"}


def check_bundle(root: Path) -> dict[str, Any]:
    """The object of `bundle.json`, after every listed file was found to match its SHA-256.

    Raises:
        RefusedInput: not a bundle, one of a newer version, or a file is missing or changed.
    """
    card = read_json(root / "bundle.json")
    listed = listed_files(str(root / "bundle.json"), card)
    for name, digest in listed.items():
        path = root / name
        actual = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no file"
        if actual != digest:
            raise RefusedInput(str(path), expected=f"SHA-256 {digest}", found=actual, remedy="pull the bundle again")
    return card


def listed_files(name: str, card: dict[str, Any]) -> dict[str, str]:
    """Files of a bundle and their SHA-256, after its format was found to be one that this version reads.

    Args:
        name: What messages call the card.
        card: Object of `bundle.json`.

    Raises:
        RefusedInput: see `check_bundle`.
    """
    form, files = card.get("format"), card.get("files")
    family, _, number = str(form).partition("/")
    if family == FORMAT.partition("/")[0] and number.isdigit() and form not in FORMATS:
        raise RefusedInput(
            name,
            expected=f"format {', '.join(FORMATS[:-1])} or {WITH_HEAD}, which this version reads",
            found=f"{form}, which a newer version wrote",
            remedy="update tomoscale, or use the code that lies in the bundle (`python -m tomoscale_portable`)",
        )
    if form not in FORMATS or card.get("kind") not in KINDS:
        raise RefusedInput(
            name,
            expected=f"format {FORMAT}, of a segmenter, an encoder, a classifier or a regressor",
            found=f"format {form!r}, kind {card.get('kind')!r}",
            remedy="name a bundle that tomoscale wrote",
        )
    if not isinstance(files, dict) or not set(files) >= NEEDED:
        raise RefusedInput(
            name,
            expected="digests of " + ", ".join(sorted(NEEDED)),
            found=", ".join(sorted(files)) if isinstance(files, dict) else repr(files),
            remedy="pull the bundle again",
        )
    return {str(key): str(digest) for key, digest in files.items()}


def with_article(kind: str) -> str:
    """A kind of bundle in a sentence."""
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def read_json(path: Path) -> dict[str, Any]:
    """An object of a bundle's JSON file.

    Raises:
        RefusedInput: it is missing or something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RefusedInput(
            str(path), expected="a bundle's JSON file", found=str(error), remedy="pull it again"
        ) from error
    if not isinstance(data, dict):
        raise RefusedInput(str(path), expected="a JSON object", found=type(data).__name__)
    return data
