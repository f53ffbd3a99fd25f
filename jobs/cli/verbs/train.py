"""methods, pretrain, tune, finetune."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from jobs.cli.verbs.common import add_json, add_state, check_starts, job_address, salt_here
from jobs.output import emit
from storage.errors import ConfigError

if TYPE_CHECKING:
    from jobs.configs import FinetuneJobConfig, PretrainConfig
    from jobs.configs.search import TuneConfig

    Job: TypeAlias = PretrainConfig | TuneConfig | FinetuneJobConfig

MODULES = {"pretrain": "jobs.pretrain", "tune": "jobs.tune", "finetune": "jobs.finetune"}
"""Of each kind of job, what runs it."""
_HELP = {
    "pretrain": "pre-train without labels and register the encoder",
    "tune": "search fine-tuning settings with early stopping",
    "finetune": "fine-tune from each start with each seed, evaluate per case, register the segmenter",
}
_CHECK = "check and print the configuration, send nothing"
_BUILD = "check and print the configuration, build everything and take one step here, send nothing"
_DRY_RUN = {"pretrain": _BUILD, "tune": _CHECK, "finetune": _CHECK}


def add(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the verbs."""
    methods = verbs.add_parser("methods", help="list the methods, or explain one")
    methods.add_argument("name", nargs="?", help="a method")
    methods.add_argument("--markdown", action="store_true", help="as a page of the documentation")
    methods.add_argument("--out", type=Path, metavar="DIR", help="write the pages of all methods there, in Markdown")
    add_json(methods)
    methods.set_defaults(run=_methods)
    for kind, text in _HELP.items():
        job = verbs.add_parser(kind, help=text)
        add_config(job)
        job.add_argument("--address", metavar="URL", help="job server; the local stack's when empty")
        job.add_argument("--dry-run", action="store_true", help=_DRY_RUN[kind])
        job.add_argument("--no-wait", action="store_true", help="submit and return")
        if kind == "tune":
            job.add_argument(
                "--resume", action="store_true", help="go on with the search of this name; refuse where there is none"
            )
        add_state(job)
        job.set_defaults(run=_submit, kind=kind)


def add_config(parser: argparse.ArgumentParser) -> None:
    """The configuration of a job, and settings that replace its own."""
    parser.add_argument("config", help="YAML file")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="settings that replace those of the file",
    )


def load_config(kind: str, arguments: argparse.Namespace) -> "Job":
    """The configuration that the arguments name, resolved and checked, its network and method included."""
    from jobs import configs
    from jobs.configs.search import TuneConfig
    from ssl_core.config import load

    models: dict[str, type[Job]] = {
        "pretrain": configs.PretrainConfig,
        "tune": TuneConfig,
        "finetune": configs.FinetuneJobConfig,
    }
    config = load(models[kind], Path(arguments.config), arguments.overrides)
    # After all that is checked without it: the import of a network takes seconds, a job that cannot start takes more.
    from jobs.plan.buildable import require_buildable

    require_buildable(config)
    return config


def _methods(arguments: argparse.Namespace) -> int:
    from jobs.output import columns
    from jobs.pages import methods as pages
    from ssl_core.methods.base import method_names

    name = arguments.name
    if arguments.out is not None:
        for path in pages.write_pages(arguments.out):
            print(path)
    elif arguments.markdown:
        print(pages.markdown_page(name) if name else pages.markdown_index(), end="")
    elif name:
        keys = ("name", "default", "text")
        rows = [dict(zip(keys, row, strict=True)) for row in pages.settings(name)]
        data = {"name": name, "idea": pages.idea(name), "text": pages.description(name), "settings": rows}
        emit(data, arguments.json, pages.text_page(name, columns()))
    else:
        ideas = [{"name": n, "text": pages.idea(n)} for n in method_names()]
        emit(ideas, arguments.json, pages.text_index(columns()))
    return 0


def _submit(arguments: argparse.Namespace) -> int:
    from jobs import submit
    from jobs.configs import PretrainConfig
    from ssl_core.config import digest, dump_yaml

    config = load_config(arguments.kind, arguments)
    check_starts(config, arguments)
    print(f"{dump_yaml(config)}# digest {digest(config)}", flush=True)
    if arguments.dry_run:
        if isinstance(config, PretrainConfig):
            from jobs.plan.dry_run import dry_run

            print(dry_run(config))
        return 0
    if (salt := salt_here()) and isinstance(config, PretrainConfig) and config.source not in (None, "simulated"):
        raise ConfigError(
            f"${salt}",
            expected="no `source` beside it, which the job would ingest with a salt of the cluster's",
            found=f"source {config.source}",
            remedy=f"first: tomoscale data ingest {config.source} {config.data}; then leave `source` out",
        )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if getattr(arguments, "resume", False):
        _require_begun(config)
    address = job_address(arguments)
    module = MODULES[arguments.kind]
    if arguments.no_wait:
        print(submit.submit(address, module, config, config.name))
        return 0
    submit.run(address, module, config, config.name, show=lambda line: print(line, flush=True))
    return 0


def _require_begun(config: "Job") -> None:
    """Refuse to resume a search that has not begun: a misspelt name would start another one.

    Raises:
        ConfigError: nothing lies below its name.
    """
    from storage.objects import join, open_store

    store = open_store(join(config.runs, config.name))
    if not store.exists("job.json"):
        raise ConfigError(
            f"--resume of {config.name!r}",
            expected=f"a search that has begun, noted at {store.url}/job.json",
            found="none",
            remedy="correct `name` or `runs`, or leave --resume out to begin one",
        )
