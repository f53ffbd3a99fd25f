"""models list | show | promote | rollback | pull | export | import."""

import argparse
import time
from pathlib import Path
from typing import Any

from jobs.cli.verbs.common import MODEL, add_json, add_state, use_stack
from jobs.exchange.forms import FORMS
from jobs.output import emit, table


def add(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the verbs."""
    models = verbs.add_parser("models", help="registered models: list, show, promote, rollback, pull, export, import")
    actions = models.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="all versions")
    show = actions.add_parser("show", help="one version, with its lineage")
    promote = actions.add_parser(
        "promote", help="make a version the champion, if it beats the current one on the same cases"
    )
    pull = actions.add_parser("pull", help="download a bundle and check every digest")
    for action, run in ((listing, _list), (show, _show), (promote, _promote), (pull, _pull)):
        if action is not listing:
            action.add_argument("model", help="models:/NAME@ALIAS, models:/NAME/VERSION or NAME")
        add_state(action)
        add_json(action)
        action.set_defaults(run=run)
    pull.add_argument("folder", type=Path, help="folder to create")
    show.add_argument("--tree", action="store_true", help="what it was trained from, and what was trained from it")

    rollback = actions.add_parser("rollback", help="move an alias back to the version that it had before")
    rollback.add_argument("name", help="registered model")
    rollback.add_argument("alias", help="such as champion")
    add_state(rollback)
    add_json(rollback)
    rollback.set_defaults(run=_rollback)

    export = actions.add_parser("export", help="write a model in the form that another tool reads")
    export.add_argument("model", help=MODEL)
    export.add_argument("folder", type=Path, help="folder to create")
    export.add_argument("--to", required=True, choices=list(FORMS), help=_forms())
    add_state(export)
    add_json(export)
    export.set_defaults(run=_export)

    arrival = actions.add_parser("import", help="make an encoder's bundle of a checkpoint of nnU-Net or nnssl")
    arrival.add_argument("file", type=Path, help="checkpoint (.pth); nothing in it is executed")
    arrival.add_argument("folder", type=Path, help="folder to create")
    arrival.add_argument("--from", dest="tool", required=True, choices=["nnunet", "nnssl"], help="who wrote it")
    arrival.add_argument("--map", type=Path, required=True, help="YAML file that says which tensor goes where")
    arrival.add_argument("--register", metavar="NAME", help="register it under this name too")
    add_state(arrival)
    add_json(arrival)
    arrival.set_defaults(run=_import)


def _list(arguments: argparse.Namespace) -> int:
    from jobs.tracking import models as registry

    use_stack(arguments)
    versions = registry.list_models()
    rows = [
        (v.name, v.version, v.tags.get("tomoscale.kind", "-"), ", ".join(v.aliases), _date(v.created_ms))
        for v in versions
    ]
    text = table(("model", "version", "kind", "aliases", "registered"), rows) if rows else "no models yet"
    emit([_plain(v) for v in versions], arguments.json, text)
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from jobs.tracking import models as registry

    use_stack(arguments)
    if arguments.tree:
        from jobs.tracking import lineage

        root, version = lineage.tree(arguments.model)
        emit({"model": version.uri, "tree": root.to_json()}, arguments.json, lineage.text(root, version))
        return 0
    facts = _plain(registry.resolve(arguments.model))
    lines = facts | {"aliases": ", ".join(facts["aliases"]) or "-"}
    emit(facts, arguments.json, "\n".join(f"{k}: {v}" for k, v in lines.items()))
    return 0


def _promote(arguments: argparse.Namespace) -> int:
    from jobs.tracking import promotion
    from jobs.tracking.models import resolve

    use_stack(arguments)
    version = resolve(arguments.model)
    reason = promotion.promote(version.name, version.version)
    emit({"champion": version.uri, "reason": reason}, arguments.json, f"{version.uri} is the champion: {reason}")
    return 0


def _rollback(arguments: argparse.Namespace) -> int:
    from jobs.tracking import promotion

    use_stack(arguments)
    target, before = promotion.rollback(arguments.name, arguments.alias)
    facts = {"alias": arguments.alias, "version": target.uri, "before": before.uri}
    emit(facts, arguments.json, f"{target.uri} is {arguments.alias} again; {before.uri} was")
    return 0


def _pull(arguments: argparse.Namespace) -> int:
    from jobs.tracking import models as registry

    use_stack(arguments)
    folder = registry.pull(arguments.model, arguments.folder)
    emit({"model": arguments.model, "folder": str(folder)}, arguments.json, str(folder))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from jobs.exchange.export import export
    from jobs.tracking.encoder import bundle_of

    use_stack(arguments)
    with bundle_of(arguments.model) as bundle:
        notes = export(bundle, arguments.folder, arguments.to)
    facts = {"model": arguments.model, "form": arguments.to, "folder": str(arguments.folder), "notes": notes}
    emit(facts, arguments.json, "\n".join([str(arguments.folder), *notes]))
    return 0


def _import(arguments: argparse.Namespace) -> int:
    from jobs.exchange.foreign import ImportMap, import_checkpoint
    from ssl_core.config import load

    mapping = load(ImportMap, arguments.map, [])
    folder = import_checkpoint(arguments.file, arguments.tool, mapping, arguments.folder)
    facts: dict[str, Any] = {"folder": str(folder), "model": None}
    if arguments.register:
        from jobs.tracking import models as registry

        use_stack(arguments)
        facts["model"] = f"models:/{arguments.register}/{registry.register(folder, arguments.register)}"
    emit(facts, arguments.json, "\n".join(filter(None, facts.values())))
    return 0


def _forms() -> str:
    return "; ".join(f"{name}: {what}" for name, (_, what) in FORMS.items())


def _plain(version: Any) -> dict[str, Any]:
    return {
        "uri": version.uri,
        "name": version.name,
        "version": version.version,
        "aliases": list(version.aliases),
        "registered": _date(version.created_ms),
        "run_id": version.run_id,
        **dict(sorted(version.tags.items())),
    }


def _date(ms: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(ms / 1000))
