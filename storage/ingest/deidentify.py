"""What may leave a scanner's header, and how people become pseudonyms.

DICOM carries names, dates and free text in hundreds of standard and private tags. Nothing of a header is kept unless it
is on the list below, and a listed value is kept only in a form that cannot carry a name: numbers as numbers, coded
strings from closed lists. Patients, studies and series are kept as keyed hashes (HMAC-SHA-256), so that the volumes of
one patient stay together and nobody without the salt can try out names or numbers.

The salt is the user's: `$TOMOSCALE_SALT`, or the file that `$TOMOSCALE_SALT_FILE` names. Without either, a random salt
is made for each store and kept under the user's own state folder, never in the store: the same machine then continues
with the same pseudonyms, and another machine cannot and says so. To ingest one data set from several machines, or to
link the pseudonyms of two stores, set the salt. Deleting it cuts the link for good.
"""

import hashlib
import hmac
import os
import re
import secrets
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from storage.errors import ConfigError

NUMBERS = frozenset(
    {
        "SliceThickness",
        "SpacingBetweenSlices",
        "RepetitionTime",
        "EchoTime",
        "InversionTime",
        "FlipAngle",
        "EchoTrainLength",
        "MagneticFieldStrength",
        "KVP",
        "Exposure",
        "XRayTubeCurrent",
        "GantryDetectorTilt",
        "ReconstructionDiameter",
    }
)
"""Keywords whose values are kept as numbers."""

CODES: Mapping[str, frozenset[str]] = {
    "Modality": frozenset(["CT", "MR", "PT", "US", "NM", "XA", "MG", "SEG"]),
    "MRAcquisitionType": frozenset({"2D", "3D"}),
    "ScanningSequence": frozenset({"SE", "IR", "GR", "EP", "RM"}),
    "SequenceVariant": frozenset({"SK", "MTC", "SS", "TRSS", "SP", "MP", "OSP", "NONE"}),
    "PatientPosition": frozenset(["HFP", "HFS", "HFDR", "HFDL", "FFDR", "FFDL", "FFP", "FFS"]),
    "PhotometricInterpretation": frozenset({"MONOCHROME1", "MONOCHROME2"}),
    "BodyPartExamined": frozenset(
        {"ABDOMEN", "ABDOMENPELVIS", "ANKLE", "BRAIN", "BREAST", "CHEST", "CHESTABDPELVIS", "CSPINE", "EXTREMITY"}
        | {"FOOT", "HAND", "HEAD", "HEADNECK", "HEART", "HIP", "KNEE", "LIVER", "LSPINE", "LUNG", "NECK", "PANCREAS"}
        | {"PELVIS", "PROSTATE", "SHOULDER", "SKULL", "SPINE", "TSPINE", "WHOLEBODY"}
    ),
}
"""Keywords whose values are kept where they are one of these."""

_SALT_BYTES = 32


def allowed_facts(dataset: Any) -> dict[str, str]:
    """The acquisition parameters of a pydicom data set that may be kept; everything else is dropped."""
    facts: dict[str, str] = {}
    for keyword in sorted(NUMBERS):
        try:
            value = float(dataset.get(keyword))
        except (TypeError, ValueError):
            continue
        if abs(value) < 1e6:
            facts[keyword] = f"{value:g}"
    for keyword, codes in CODES.items():
        value_ = dataset.get(keyword)
        parts = (
            [value_] if isinstance(value_, str) else value_ if isinstance(value_, (list, tuple)) else list(value_ or ())
        )
        listed = [str(part).strip().upper() for part in parts]
        listed = [part for part in listed if part in codes]
        if listed:
            facts[keyword] = "/".join(listed)
    return facts


@dataclass(frozen=True)
class Pseudonyms:
    """Keyed hashes of identifiers. The salt stays out of `repr`, logs and stores."""

    salt: bytes = field(repr=False)

    def of(self, kind: str, value: str) -> str:
        """A pseudonym of 16 hex digits (64 bits); equal values of one kind have equal pseudonyms."""
        return hmac.new(self.salt, f"{kind}\0{value.strip()}".encode(), hashlib.sha256).hexdigest()[:16]


def load_salt(store_url: str, environment: Mapping[str, str] | None = None, *, used: bool = False) -> Pseudonyms:
    """The user's salt for a store; see the head of this module.

    Args:
        used: The store holds pseudonyms already: no salt is made, for by another one a patient would be two.

    Raises:
        ConfigError: `$TOMOSCALE_SALT` is too short to protect anything, a salt file cannot be read or written, or the
            one that was used is not here.
    """
    env = os.environ if environment is None else environment
    text = env.get("TOMOSCALE_SALT", "")
    if text:
        return Pseudonyms(_long_enough("TOMOSCALE_SALT", text.encode()))
    salt_file = env.get("TOMOSCALE_SALT_FILE", "")
    path = Path(salt_file).expanduser() if salt_file else state_file(store_url, "salts", ".salt", env)
    if salt_file or path.exists():
        try:
            return Pseudonyms(_long_enough(str(path), path.read_bytes().strip()))
        except OSError as error:
            raise ConfigError(str(path), expected="a readable salt file", found=str(error.strerror)) from error
    if used:
        raise ConfigError(
            str(path),
            expected=f"the salt of the pseudonyms that {store_url} holds",
            found="none here: it was made on another machine, by another user, or set in the environment",
            remedy="copy it here, or set TOMOSCALE_SALT or TOMOSCALE_SALT_FILE",
        )
    return Pseudonyms(_create(path))


def _long_enough(thing: str, salt: bytes) -> bytes:
    if len(salt) < 16:
        raise ConfigError(
            thing,
            expected="a salt of at least 16 bytes",
            found=f"{len(salt)}",
            remedy="make one: python -c 'import secrets; print(secrets.token_hex(32))'",
        )
    return salt


def state_file(store_url: str, folder: str, suffix: str, environment: Mapping[str, str] | None = None) -> Path:
    """Where the user's own state folder has what belongs to a store and must not lie in it."""
    base = (os.environ if environment is None else environment).get("XDG_STATE_HOME", "")
    readable = re.sub(r"[^A-Za-z0-9]+", "-", store_url).strip("-")[-40:]
    name = f"{readable}-{hashlib.sha256(store_url.rstrip('/').encode()).hexdigest()[:12]}{suffix}"
    try:
        state = Path(base) if base else Path.home() / ".local" / "state"
    except RuntimeError:  # a user without a home, as in some containers
        state = Path("/.local/state")
    return state / "tomoscale" / folder / name


def _create(path: Path) -> bytes:
    salt = secrets.token_hex(_SALT_BYTES).encode()
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=path.parent)  # mode 0600
        with os.fdopen(handle, "wb") as file:
            file.write(salt)
        try:
            os.link(temporary, path)  # two ingests that start together end with one salt
        except FileExistsError:
            return path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(
            str(path),
            expected="a folder where a new salt can be kept",
            found=str(error.strerror),
            remedy="set TOMOSCALE_SALT or TOMOSCALE_SALT_FILE",
        ) from error
    finally:
        if temporary:
            with suppress(OSError):
                os.unlink(temporary)
    return salt
