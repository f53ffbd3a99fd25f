"""Puts the tables of saved runs into a page: `python -m jobs.bench.device.page PAGE FOLDER`.

See `jobs.bench.storage.page`.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.bench.device import losses, views
from jobs.bench.device.step import PARTS
from jobs.bench.measure import table
from jobs.bench.storage.page import Result, Tables, fill

_STEP = {
    "method": "method",
    "backbone": "network",
    "variant": "variant",
    "parameters_m": "M parameters",
    "samples_per_s": "samples/s",
    "of_plain": "speed / plain",
    "step_s": "step s, median [p95]",
    "state_mib": "state MiB",
    "step_mib": "step MiB",
    **{part: f"{part} %" for part in PARTS},
    "gflop": "GFLOP a step",
    "reached": "of the convolution rate %",
}
_VARIANTS = ("method", "variant", "samples_per_s", "of_plain", "step_s", "state_mib", "step_mib", "reached")
_METHODS = ("method", "parameters_m", "samples_per_s", "step_s", "state_mib", "step_mib", *PARTS, "gflop", "reached")
_NETWORKS = (
    "backbone",
    "parameters_m",
    "samples_per_s",
    "step_s",
    "state_mib",
    "step_mib",
    "views",
    "gflop",
    "reached",
)


def machine(result: Result, _: str = "") -> str:
    """Hardware, versions and what was measured, in a line or two."""
    facts = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    threads = "1 thread" if facts["threads"] == 1 else f"{facts['threads']} threads"
    return (
        f"{facts['processor']} ({facts['capability']}), {threads} of {facts['cores']} cores, "
        f"{facts['memory_gib']} GiB, "
        f"{', '.join(facts['accelerators']) or 'no accelerator'}; Python {facts['python']}, {versions}; "
        f"load at the start {facts['load_1min']}."
    )


def _step(*keys: str) -> Callable[[Result, str], str]:
    def make(result: Result, _: str) -> str:
        return table([_row(row, result["rows"]) for row in result["rows"]], {key: _STEP[key] for key in keys})

    return make


def _row(row: dict[str, Any], every: list[dict[str, Any]]) -> dict[str, Any]:
    plain = [
        r for r in every if r["variant"] == "plain" and (r["method"], r["backbone"]) == (row["method"], row["backbone"])
    ]
    median, late = row["step_s"]
    return {
        **{
            key: row[key]
            for key in ("method", "backbone", "variant", "samples_per_s", "state_mib", "step_mib", "gflop")
        },
        **{part: f"{100 * share:.1f}" for part, share in row["shares"].items()},
        "parameters_m": row["parameters"] / 1e6,
        "of_plain": row["samples_per_s"] / plain[0]["samples_per_s"] if plain else None,
        "step_s": f"{median:.3g} [{late:.3g}]",
        "reached": f"{100 * row['reached']:.0f}",
    }


def _rates(result: Result, _: str) -> str:
    rows = [{"what": what, "gflops": rate / 1e9} for what, rate in result["rates"].items()]
    return table(rows, {"what": "device and precision", "gflops": "GFLOP/s of 3x3x3 convolutions"})


def _views_share(result: Result, _: str) -> str:
    shares = {row["method"]: 100 * row["shares"]["views"] for row in result["rows"]}
    most = max(shares, key=lambda name: shares[name])
    return f"Views take {min(shares.values()):.1f} to {shares[most]:.1f} % of a step here; the most in `{most}`."


def _nnssl(result: Result, _: str) -> str:
    published, hardware = result["nnssl"]["published"], result["nnssl"]["hardware"]
    rows = [
        {"whose": f"tomoscale, {r['variant']}", "where": r["device"], "step": f"{r['batch']} crops"}
        | {"views": 2 * r["samples_per_s"], "memory": f"{(r['state_mib'] + r['step_mib']) / 1024:.1f} GiB"}
        for r in result["rows"]
    ]
    rows += [
        {"whose": "nnssl, published", "where": hardware, "step": f"{p['samples']} images x {p['crops']} crops"}
        | {"views": p["views_per_s"], "memory": f"{p['gb']} GB" if p["gb"] else None}
        for p in published
    ]
    columns = {"whose": "whose", "where": "on", "step": "step", "views": "views/s", "memory": "memory"}
    return table(rows, columns) + f"\n\n{result['nnssl']['note'][0].upper()}{result['nnssl']['note'][1:]}."


def _losses(result: Result, _: str) -> str:
    return losses.format_losses(dict(result))


def _views(result: Result, _: str) -> str:
    return views.format_views(dict(result))


TABLES: Tables = {
    **{
        f"{run}-machine": (run, machine)
        for run in ("variants", "methods", "later", "backbones", "nnssl", "losses", "views")
    },
    "rates": ("variants", _rates),
    "variants": ("variants", _step(*_VARIANTS)),
    "methods": ("methods", _step(*_METHODS)),
    "later": ("later", _step(*_METHODS)),
    "views-share": ("methods", _views_share),
    "backbones": ("backbones", _step(*_NETWORKS)),
    "nnssl": ("nnssl", _nnssl),
    "losses": ("losses", _losses),
    "views": ("views", _views),
}


def main(page: str, folder: str) -> None:
    """Rewrite the page in place."""
    path = Path(page)
    path.write_text(fill(path.read_text(encoding="utf-8"), Path(folder), TABLES), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:3])
