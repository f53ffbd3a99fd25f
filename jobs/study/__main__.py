"""`python -m jobs.study CONFIG [key=value ...]`: the driver of the Ray job; with `--local FOLDER` no Ray is needed."""

import sys
from collections.abc import Sequence
from pathlib import Path

from jobs import driver
from jobs.configs.study import StudyConfig


def main(argv: Sequence[str]) -> int:
    """One of the two ways."""
    if "--local" not in argv:
        from jobs.study.driver import main as on_ray

        return on_ray(argv)
    from jobs.study import local

    at = list(argv).index("--local")
    rest, folder = [*argv[:at], *argv[at + 2 :]], Path(*argv[at + 1 : at + 2])
    config = local.placed(driver.load(StudyConfig, rest, "jobs.study"), folder)
    command = " ".join(["python -m jobs.study", *argv])
    local.study(config, folder, command, lambda line: print(line, flush=True))
    return 0


if __name__ == "__main__":
    sys.exit(driver.guarded(main))
