"""What Ray Train costs: the same loop, configuration, data and two processes under Ray Train and under `torchrun`.

Runs alternate, so that a machine whose speed drifts slows both; the figure is the ratio of median step times, first
report left out (it holds imports and the first batch).
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jobs import submit
from jobs.configs import PretrainConfig
from jobs.demo import presets
from jobs.output import table
from jobs.tracking import runs as tracking
from ssl_core.config import dump_yaml, parse


def bench_overhead(
    address: str, data: str, *, rounds: int = 3, steps: int = 60, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Step times and data wait of both, by round.

    Args:
        address: Job server.
        data: URL of an ingested store.
        rounds: Runs of each.
        steps: Steps of a run.
        say: Hears progress.
    """
    results: dict[str, list[dict[str, float]]] = {"ray": [], "torchrun": []}
    for index in range(rounds):
        for kind in ("ray", "torchrun"):
            name = f"bench-{kind}-{time.strftime('%H%M%S')}-{index}"
            plan = presets.pretrain(name, data, "s3://runs")
            plan["engine"] |= {"steps": steps, "checkpoint_every": steps, "probe_every": 0, "log_every": 5}
            config = parse(PretrainConfig, plan)
            began = time.monotonic()
            points = _ray(address, config, say) if kind == "ray" else _torchrun(config)
            late = [metrics for step, _, metrics in points if step > 5 and "time/step_s" in metrics]
            figures = {
                "step_s": statistics.median(m["time/step_s"] for m in late),
                "wait_share": statistics.median(m["time/wait_share"] for m in late),
                "whole_s": time.monotonic() - began,
            }
            results[kind].append(figures)
            line = f"step {figures['step_s']:.3f} s, data wait {figures['wait_share']:.2%}"
            say(f"round {index + 1}/{rounds} {kind}: {line}")
    ratios = [a["step_s"] / b["step_s"] for a, b in zip(results["ray"], results["torchrun"], strict=True)]
    return {
        "rounds": results,
        "ratio_median": statistics.median(ratios),
        "ratios": ratios,
        "wait_share_median": statistics.median(r["wait_share"] for r in results["ray"]),
    }


def format_overhead(result: Mapping[str, Any]) -> str:
    """The rounds as a table, and the medians."""
    pairs = zip(result["rounds"]["ray"], result["rounds"]["torchrun"], result["ratios"], strict=True)
    rows = [(i + 1, a["step_s"], b["step_s"], ratio, 100 * a["wait_share"]) for i, (a, b, ratio) in enumerate(pairs)]
    text = table(("round", "Ray Train step s", "torchrun step s", "ratio", "data wait %"), rows)
    return f"{text}\nmedian ratio {result['ratio_median']:.3f}, median data wait {result['wait_share_median']:.2%}"


def _ray(address: str, config: PretrainConfig, say: Callable[[str], None]) -> list[list[Any]]:
    submit.run(address, "jobs.pretrain", config, config.name, show=say)
    return tracking.points_of(config.experiment, config.name)


def _torchrun(config: PretrainConfig) -> list[list[Any]]:
    with tempfile.TemporaryDirectory(prefix="tomoscale-bench-") as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(dump_yaml(config), encoding="utf-8")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["-m", "jobs.torchrun", str(path), "--out", folder]
        # As under Ray, which gives each worker as many threads as CPUs it asked for, one, and here no GPU.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        lines = (Path(folder) / config.name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
