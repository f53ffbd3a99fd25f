"""study."""

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.cli.verbs.common import add_state, check_starts, job_address, use_stack
from storage.errors import ConfigError

if TYPE_CHECKING:
    from jobs.configs.study import StudyConfig

_TEXT = """\
Compares starts (pre-trained, supervised, random weights) over draws of labelled subjects, counts of labels and
pre-training seeds, with settings that are searched for each and recorded before the test is opened. Killed anywhere,
the same command goes on."""


def add(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the verb."""
    study = verbs.add_parser("study", help="whether pre-training helps, over draws of labels", description=_TEXT)
    study.add_argument("config", nargs="?", help="YAML file; with --smoke the simulated cohort when empty")
    study.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="settings that replace its own")
    study.add_argument(
        "--propose",
        metavar="URL",
        help="print a study that fits a store, from its manifest alone; takes label=NAME and voxels=N",
    )
    study.add_argument(
        "--keep", metavar="START", help="print the pre-training of a start as a configuration of `tomoscale pretrain`"
    )
    study.add_argument("--smoke", action="store_true", help="two starts, two counts and a few steps, in two minutes")
    study.add_argument(
        "--local", type=Path, metavar="DIR", help="run here, without a stack, with results in this folder"
    )
    study.add_argument("--out", type=Path, metavar="DIR", help="folder of the report of a job (default study-NAME)")
    study.add_argument("--address", metavar="URL", help="job server; the local stack's when empty")
    study.add_argument(
        "--dry-run",
        action="store_true",
        help="check and print the configuration, what it would do and what it could show; run nothing",
    )
    study.add_argument(
        "--measure",
        action="store_true",
        help="take a few real steps of every part here and say how long the study would take; run nothing else",
    )
    study.add_argument("--no-wait", action="store_true", help="submit and return")
    add_state(study)
    study.set_defaults(run=_study)


def load_study(arguments: argparse.Namespace) -> "StudyConfig":
    """The study that the arguments name, resolved and checked.

    Raises:
        ConfigError: no configuration, or a wrong one.
    """
    from jobs.configs.study import StudyConfig
    from jobs.study import smoke
    from ssl_core.config import load, resolved

    path, overrides = arguments.config, list(arguments.overrides)
    if path is not None and arguments.smoke and "=" in path:
        path, overrides = None, [path, *overrides]
    if path is None:
        if not arguments.smoke:
            raise ConfigError(
                "study",
                expected="a YAML file",
                found="none",
                remedy="name one, or see a study of two minutes with --smoke",
            )
        return load(StudyConfig, resolved(smoke.simulated()), overrides)
    config = load(StudyConfig, Path(path), overrides)
    return smoke.shrunk(config) if arguments.smoke else config


def _proposed(arguments: argparse.Namespace) -> str:
    """A study for a store, as YAML."""
    from jobs.study.proposal import ProposalConfig, propose
    from ssl_core.config import load
    from storage.format.manifest import Manifest

    use_stack(arguments)
    changes = [word for word in (arguments.config, *arguments.overrides) if word is not None]
    config = load(ProposalConfig, {}, changes)
    return propose(Manifest.open(arguments.propose), arguments.propose, config)


def _study(arguments: argparse.Namespace) -> int:
    if arguments.propose is not None:
        print(_proposed(arguments), end="")
        return 0
    from jobs.plan.buildable import require_buildable
    from ssl_core.config import digest, dump_yaml

    config = load_study(arguments)
    require_buildable(config)
    if arguments.keep is not None:
        from jobs.study.proposal import kept

        print(kept(config, arguments.keep), end="")
        return 0
    if arguments.local is not None:
        from jobs.study import local

        config = local.placed(config, arguments.local)
    check_starts(config, arguments)
    if arguments.dry_run or not arguments.measure:
        print(f"{dump_yaml(config)}# digest {digest(config)}", flush=True)
    if arguments.dry_run:
        from jobs.study.run import forecast

        _say(forecast(config))
    if arguments.measure:
        _measure(config, arguments)
    if arguments.dry_run or arguments.measure:
        return 0
    command = command_of(arguments)
    if arguments.local is not None:
        local.study(config, arguments.local, command, _say)
        return 0
    return _submitted(config, arguments, command)


def _measure(config: "StudyConfig", arguments: argparse.Namespace) -> None:
    from jobs.ingestion import ensure_data
    from jobs.plan import study as plan
    from storage.ingest.mapping import map_threads

    use_stack(arguments)
    ensure_data(config.data, config.source, map_threads)
    parts = plan.measured(config, say=lambda line: print(line, file=sys.stderr, flush=True))
    _say(plan.text(parts, config.concurrent))


def command_of(arguments: argparse.Namespace) -> str:
    """What repeats the study; words with spaces are quoted."""
    words = ["tomoscale", "study", *([arguments.config] if arguments.config else []), *arguments.overrides]
    words += ["--smoke"] if arguments.smoke else []
    words += ["--local", str(arguments.local)] if arguments.local is not None else []
    return shlex.join(words)


def _submitted(config: "StudyConfig", arguments: argparse.Namespace, command: str) -> int:
    from jobs import submit

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    use_stack(arguments)
    address = job_address(arguments)
    if arguments.no_wait:
        print(submit.submit(address, "jobs.study", config, config.name))
        return 0
    submit.run(address, "jobs.study", config, config.name, show=_say)
    if config.until == "search":
        return 0
    from jobs.study.report import fetch

    for path in fetch(config, arguments.out or Path(f"study-{config.name}"), command):
        _say(f"report: {path}")
    return 0


def _say(line: str) -> None:
    print(line, flush=True)
