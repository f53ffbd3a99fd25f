"""methods, plan, pretrain, tune, finetune."""

import argparse
import inspect
import os
from pathlib import Path
from typing import Any

from jobs.commands.common import add_json, add_state, job_address, use_stack
from jobs.text import emit, table

_MODULES = {"pretrain": "jobs.pretrain", "tune": "jobs.tune", "finetune": "jobs.finetune"}
_HELP = {
    "pretrain": "pre-train without labels and register the encoder",
    "tune": "search fine-tuning settings with early stopping",
    "finetune": "fine-tune from each start with each seed, evaluate per case, register the segmenter",
}


def add(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the verbs."""
    methods = verbs.add_parser("methods", help="list the methods, or explain one")
    methods.add_argument("name", nargs="?", help="a method")
    add_json(methods)
    methods.set_defaults(run=_methods)
    plan = verbs.add_parser("plan", help="print the resolved configuration of a job")
    plan.add_argument("kind", choices=sorted(_MODULES), help="what the configuration is for")
    _add_config(plan)
    add_json(plan)
    plan.set_defaults(run=_plan)
    for kind, text in _HELP.items():
        job = verbs.add_parser(kind, help=text)
        _add_config(job)
        job.add_argument("--address", metavar="URL", help="job server; the local stack's when empty")
        job.add_argument("--dry-run", action="store_true", help="check and print the configuration, send nothing")
        job.add_argument("--no-wait", action="store_true", help="submit and return")
        add_state(job)
        job.set_defaults(run=_submit, kind=kind)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")


def _load(kind: str, arguments: argparse.Namespace) -> Any:
    from jobs import configs
    from ssl_core.config import load

    model = {"pretrain": configs.PretrainConfig, "tune": configs.TuneConfig, "finetune": configs.FinetuneJobConfig}[
        kind
    ]
    return load(model, Path(arguments.config), arguments.overrides)


def _methods(arguments: argparse.Namespace) -> int:
    import ssl_core.methods  # noqa: F401  registers them
    from ssl_core.methods.base import method_class, method_names

    if arguments.name:
        kind = method_class(arguments.name)
        rows = [(name, str(field.default), field.description or "") for name, field in kind.Config.model_fields.items()]
        page = inspect.getdoc(inspect.getmodule(kind)) or inspect.getdoc(kind) or ""
        text = f"{arguments.name}\n\n{page}\n\n{table(('setting', 'default', 'meaning and source'), rows)}"
        data = {
            "name": arguments.name,
            "text": page,
            "settings": [dict(zip(("name", "default", "text"), r, strict=True)) for r in rows],
        }
        emit(data, arguments.json, text)
        return 0
    found = [(name, _summary(method_class(name))) for name in method_names()]
    emit([{"name": n, "text": s} for n, s in found], arguments.json, table(("method", "idea"), found))
    return 0


def _summary(kind: type) -> str:
    text = inspect.getdoc(inspect.getmodule(kind)) or inspect.getdoc(kind) or ""
    return text.split("\n", 1)[0]


def _plan(arguments: argparse.Namespace) -> int:
    from ssl_core.config import digest, dump_yaml, resolved

    config = _load(arguments.kind, arguments)
    emit(
        {"digest": digest(config), "config": resolved(config)},
        arguments.json,
        f"{dump_yaml(config)}# digest {digest(config)}",
    )
    return 0


def _submit(arguments: argparse.Namespace) -> int:
    from jobs import submit
    from ssl_core.config import digest, dump_yaml

    config = _load(arguments.kind, arguments)
    print(f"{dump_yaml(config)}# digest {digest(config)}", flush=True)
    if arguments.dry_run:
        return 0
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    use_stack(arguments)
    address = job_address(arguments)
    module = _MODULES[arguments.kind]
    if arguments.no_wait:
        print(submit.submit(address, module, config, config.name))
        return 0
    submit.run(address, module, config, config.name, show=lambda line: print(line, flush=True))
    return 0
