"""The page of a run on an accelerator: `python -m jobs.bench.device.gpu_page gpu.json docs/benchmarks-gpu.md`."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.bench.device.page import machine
from jobs.bench.measure import table
from jobs.output import write_page

_VARIANTS = {
    "method": "method",
    "variant": "variant",
    "samples_per_s": "samples/s",
    "of_plain": "speed / plain",
    "step": "step s, median [p95]",
    "memory": "state + step, GiB",
    "views": "views %, waited for",
    "reached": "of the convolution rate %",
}
_TIMED = {"samples_per_s": "samples/s", "wait": "waits for data %", "views": "views %", "step": "step %"}


def page(result: Mapping[str, Any]) -> str:
    """Markdown of what `jobs.bench.device.gpu.bench_gpu` gave."""
    size = result["size"]
    edge = "x".join(map(str, size["size_DHW"]))
    rates = ", ".join(f"{name} {rate / 1e12:.1f}" for name, rate in result["rates"].items())
    goal = [100 * row["shares"]["views"] for row in result["views"] if row["way"] == "all on the device"]
    lines = [
        "# Benchmarks on an accelerator",
        "",
        "Made from the JSON of one run, `python -m jobs.bench gpu --out gpu.json`, by "
        "`python -m jobs.bench.device.gpu_page`.",
        "",
        machine(dict(result)),
        "",
        f"`{size['backbone']}`, {size['batch']} samples of {edge} voxels a step, {size['steps']} steps a row; "
        f"{result['spent_s']:.0f} s in all. 3x3x3 convolutions reach, TFLOP/s: {rates}.",
        "",
        "## Variants of a step",
        "",
        table(_variants(result["variants"]), _VARIANTS),
        "",
        "## Where views are made",
        "",
        "Shares of the device's time by its own events, of steps that nobody waits for. What the CPU makes is made "
        "ahead, by threads."
        + (f" Made on the device, views take {max(goal):.1f} % at most; the goal is 15 %." if goal else ""),
        "",
        table([_timed(row) | row for row in result["views"]], {"method": "method", "way": "views", **_TIMED}),
        "",
        "## Beside a twin that loads no data",
        "",
        "The twin trains on one batch of views that stays on the device.",
        "",
        table(
            [_timed(row["whole"]) | {"method": row["method"], "of_twin": row["of_twin"]} for row in result["twin"]],
            {"method": "method", **_TIMED, "of_twin": "speed / twin"},
        ),
        "",
        "## SimCLR as nnssl publishes it",
        "",
        table(_nnssl(result), {"whose": "whose", "on": "on", "step": "step", "views": "views/s", "memory": "memory"}),
        "",
        f"Theirs was measured on other hardware: {result['peer']['source']}.",
    ]
    if result["left_out"]:
        lines += ["", "## Left out", "", *(f"- {item['part']}: {item['why']}" for item in result["left_out"])]
    return "\n".join(lines) + "\n"


def _variants(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    plain = {row["method"]: row["samples_per_s"] for row in rows if row["variant"] == "plain"}
    return [
        {
            **{key: row[key] for key in ("method", "variant", "samples_per_s")},
            "of_plain": row["samples_per_s"] / plain[row["method"]] if row["method"] in plain else None,
            "step": f"{row['step_s'][0]:.3g} [{row['step_s'][1]:.3g}]",
            "memory": f"{row['state_mib'] / 1024:.2f} + {row['step_mib'] / 1024:.2f}",
            "views": f"{100 * row['shares']['views']:.1f}",
            "reached": f"{100 * row['reached']:.0f}",
        }
        for row in rows
    ]


def _timed(row: Mapping[str, Any]) -> dict[str, Any]:
    shares = {name: f"{100 * share:.1f}" for name, share in row["shares"].items()}
    return {"samples_per_s": row["samples_per_s"], **shares}


def _nnssl(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    own = [
        {
            "whose": "tomoscale",
            "on": row["device"],
            "step": f"{row['batch']} crops",
            "views": 2 * row["samples_per_s"],
            "memory": f"{(row['state_mib'] + row['step_mib']) / 1024:.1f} GiB",
        }
        for row in result["nnssl"]
    ]
    return own + [
        {
            "whose": "nnssl, published",
            "on": result["peer"]["hardware"],
            "step": f"{item['samples']} images x {item['crops']} crops",
            "views": item["views_per_s"],
            "memory": f"{item['gb']} GB" if item["gb"] else None,
        }
        for item in result["peer"]["published"]
    ]


def main(run: str, target: str) -> None:
    """Write the page of a run."""
    write_page(Path(target), page(json.loads(Path(run).read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main(*sys.argv[1:3])
