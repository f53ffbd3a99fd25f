"""`tomoscale models export`: a bundle in the form that another tool reads, written whole or not at all.

Each form is checked before it is put in place: what was written is read again and computes what the bundle computes.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from jobs.exchange.forms import FORMS
from jobs.exchange.model import Model, open_model
from storage.errors import ConfigError

Write = Callable[[Model, Path], list[str]]
"""Fills a folder; returns notes for a person, in which `{folder}` is where it will be."""


def export(bundle: Path, target: Path, form: str) -> list[str]:
    """Write a bundle in another form to a new folder; returns notes for a person.

    Args:
        bundle: Folder of a bundle.
        target: Folder to create.
        form: One of `FORMS`.

    Raises:
        ConfigError: the target exists, an unknown form, one that this model or this environment does not have, or what
            was written computes something else.
        RefusedInput: the bundle is damaged.
    """
    if form not in FORMS:
        raise ConfigError(
            "--to", expected="one of " + ", ".join(FORMS), found=repr(form), remedy="`tomoscale models export --help`"
        )
    if os.path.lexists(target):
        raise ConfigError(
            str(target), expected="a new folder", found="one that exists", remedy="remove it or name another"
        )
    if not target.absolute().parent.is_dir():
        raise ConfigError(str(target.parent), expected="a folder", found="none", remedy="create it first")
    write: Write = import_module(f"jobs.exchange.{FORMS[form][0]}").write
    model = open_model(bundle)
    work = Path(tempfile.mkdtemp(dir=target.absolute().parent, prefix=f".{target.name}."))
    try:
        notes = write(model, work)
        work.chmod(0o755)
        os.rename(work, target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return [note.replace("{folder}", str(target)) for note in notes]
