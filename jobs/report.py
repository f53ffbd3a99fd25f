"""The demo's report: one HTML file that needs nothing else, and the same facts as a table in the terminal."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from jobs.text import table

_COLOURS = ("#2f6f9f", "#c2703d", "#5b8c5a", "#8a5a9e")
_INK = "#3b4350"

_STYLE = """
:root{--ink:#1f2733;--soft:#5c6675;--line:#dfe3e8;--page:#f6f7f9;--card:#fff;--accent:#2f6f9f;--warn:#8a4b12;--warnbg:#fdf3e7}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
  font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1060px;margin:0 auto;padding:32px 20px 64px}
h1{font-size:27px;margin:0 0 4px;letter-spacing:-.01em}
h2{font-size:18px;margin:0 0 12px}
p{margin:0 0 12px}
.lead{color:var(--soft);margin-bottom:20px}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:20px 22px;margin:0 0 18px}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:14px;margin:0 0 18px}
.facts div{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 16px}
.facts b{display:block;font-size:22px;font-variant-numeric:tabular-nums}
.facts span{color:var(--soft);font-size:13px}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:6px 10px;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--soft);font-weight:600}
td.n,th.n{text-align:right}
img{max-width:100%;height:auto;display:block;margin:0 auto}
figure{margin:0 0 14px}
figcaption{color:var(--soft);font-size:13px;margin-top:6px}
.note{background:var(--warnbg);color:var(--warn);border-radius:8px;padding:10px 14px;margin:0 0 18px}
.say{border-left:3px solid var(--accent);padding-left:12px}
pre{background:var(--page);border:1px solid var(--line);border-radius:8px;padding:12px;overflow:auto;
  font-size:12.5px;line-height:1.45;max-height:420px}
code{font-size:13px;overflow-wrap:anywhere}
details summary{cursor:pointer;color:var(--accent)}
a{color:var(--accent)}
"""


def loss_figure(points: Sequence[Sequence[Any]]) -> bytes:
    """PNG of the loss terms over steps; `points` are journal items [step, ms, metrics]."""
    names = sorted({k for _, _, m in points for k in m if k == "loss" or k.startswith("loss/")})
    if len(names) == 2:  # a single term is the loss itself
        names = ["loss"]
    figure, axis = plt.subplots(figsize=(7.2, 2.9))
    for name, colour in zip(names, _COLOURS * 3, strict=False):
        xy = [(s, m[name]) for s, _, m in points if name in m]
        label = "total" if name == "loss" else name.removeprefix("loss/")
        axis.plot(*zip(*xy, strict=True), color=colour, label=label, lw=1.8, marker="o", ms=2.5)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("loss")
    if len(names) > 1:
        axis.legend(frameon=False)
    return _png(figure, axis)


def dice_figure(cases: Sequence[Mapping[str, Any]]) -> bytes:
    """PNG of Dice per test case, mean over labels and seeds, one box and its points a start, pairs joined."""
    starts = list(dict.fromkeys(c["start"] for c in cases))
    volumes = sorted({c["volume_id"] for c in cases})
    values = {s: np.array([_mean_dice(cases, s, v) for v in volumes]) for s in starts}
    figure, axis = plt.subplots(figsize=(7.2, 3.2))
    jitter = np.random.default_rng(0).uniform(-0.07, 0.07, len(volumes))
    if len(starts) == 2:
        for i in range(len(volumes)):
            pair = [values[s][i] for s in starts]
            axis.plot([1 + jitter[i], 2 + jitter[i]], pair, color="#9aa3af", lw=0.6, alpha=0.55, zorder=1)
    for i, start in enumerate(starts, 1):
        axis.boxplot(
            values[start],
            positions=[i],
            widths=0.34,
            showfliers=False,
            medianprops={"color": _INK, "lw": 1.6},
            boxprops={"color": _INK},
            whiskerprops={"color": _INK},
            capprops={"color": _INK},
        )
        axis.scatter(
            i + jitter, values[start], s=15, color=_COLOURS[(i - 1) % len(_COLOURS)], alpha=0.85, zorder=3, lw=0
        )
    axis.set_xticks(range(1, len(starts) + 1), starts)
    axis.set_ylabel("Dice of a test case\n(mean of labels and seeds)")
    return _png(figure, axis)


def _mean_dice(cases: Sequence[Mapping[str, Any]], start: str, volume: str) -> float:
    return float(np.mean([c["dice"] for c in cases if c["start"] == start and c["volume_id"] == volume]))


def _png(figure: Any, axis: Any) -> bytes:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.grid(axis="y", color="#e6e9ed", lw=0.8)
    axis.set_axisbelow(True)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    plt.close(figure)
    return buffer.getvalue()


def render(summary: Mapping[str, Any], pictures: Mapping[str, bytes], captions: Mapping[str, str]) -> str:
    """The whole page.

    Args:
        summary: As written to `summary.json`.
        pictures: PNGs by name: `views`, and previews named `preview-*`.
        captions: Captions by the same names.
    """
    data, pre, tune, fine = (summary[k] for k in ("data", "pretrain", "search", "finetune"))
    parts = [
        "<h1>tomoscale: from raw volumes to a registered segmenter</h1>",
        f'<p class="lead">{_e(data["description"])}; {_e(summary["created"])}.</p>',
    ]
    if data["simulated"]:
        parts.append(
            '<p class="note">These subjects are <b>simulated</b>: one real head template and its atlas labels,'
            " warped at random. The numbers show that the machinery works; they say nothing of real patients.</p>"
        )
    parts.append(_facts(summary))
    parts.append(
        _section(
            "What the numbers say",
            f'<p class="say">{_e(fine["test"]["statement"])}</p>'
            + _figure(dice_figure(fine["cases"]), "Each dot is a held-out subject; grey lines join the same subject.")
            + _table(
                ("start", "label", "Dice", "HD95 (mm)", f"NSD ({fine['nsd_tolerance_mm']:g} mm)", "cases × seeds"),
                [
                    (
                        r["start"],
                        r["label"],
                        f"{r['dice_mean']:.3f} ± {r['dice_sd']:.3f}",
                        f"{r['hd95_mean']:.2f} ± {r['hd95_sd']:.2f}" if r["hd95_mean"] is not None else "-",
                        f"{r['nsd_mean']:.3f} ± {r['nsd_sd']:.3f}",
                        f"{r['cases']} × {r['seeds']}",
                    )
                    for r in fine["rows"]
                ],
            ),
        )
    )
    previews = [n for n in pictures if n.startswith("preview")]
    shown = "".join(_figure(pictures[n], captions.get(n, "")) for n in previews)
    predict = summary["predict"]
    shown += (
        f"<p>Predicted from the registry: <code>{_e(predict['model'])}</code> on <code>{_e(predict['input'])}</code>,"
    )
    shown += f" written to <code>{_e(predict['output'])}</code> with the same shape and affine.</p>"
    parts.append(_section("Predictions on held-out subjects", shown))
    pre_text = (
        f"<p>{_e(pre['method'])}, {pre['steps']} steps of {pre['global_batch']} crops on {pre['workers']} Ray Train"
        f" workers; {pre['samples_per_s']:.2f} samples/s, data wait {100 * pre['wait_share']:.1f} % of the step time."
        f' <a href="{_e(pre["run_url"])}">MLflow run</a>, model <code>{_e(pre["model"])}</code>.</p>'
    )
    parts.append(
        _section("Pre-training without labels", pre_text + _figure(loss_figure(pre["points"]), "Loss by step."))
    )
    if "views" in pictures:
        parts.append(
            _section("Two views and the region they share", _figure(pictures["views"], captions.get("views", "")))
        )
    rows = [
        (
            t["trial"],
            t["encoder"],
            f"{t['lr']:.2e}",
            f"{t['encoder_lr_scale']:g}",
            f"{t['epochs']} of {tune['epochs']}" + (" (stopped early)" if t["stopped_early"] else ""),
            f"{t['best']:.3f}" if t["best"] is not None else t["status"],
        )
        for t in tune["trials"]
    ]
    head = ("trial", "encoder", "lr", "encoder lr ×", "epochs", "inner Dice")
    parts.append(_section("Search on the inner split", _table(head, rows) + f"<p>Chosen: {_e(tune['chosen'])}.</p>"))
    orphans = "".join(f"<li>{_e(o)}</li>" for o in data["notes"])
    volumes = f"<p>{_e(data['text'])}</p>" + (f"<ul>{orphans}</ul>" if orphans else "")
    parts.append(_section("Data", volumes + _table(("fact", "value"), list(data["facts"].items()))))
    parts.append(
        _section("Time", _table(("stage", "seconds"), [(n, f"{s:.1f}") for n, s in summary["timings"].items()]))
    )
    links = "".join(f'<li>{_e(n)}: <a href="{_e(u)}">{_e(u)}</a></li>' for n, u in summary["links"].items())
    links = f"<ul>{links}</ul><p>The links work while the stack is up (<code>tomoscale demo --keep</code>).</p>"
    parts.append(_section("Where things are", links))
    config = f"<details><summary>Resolved configuration</summary><pre>{_e(summary['config'])}</pre></details>"
    parts.append(_section("Environment", _table(("", ""), list(summary["environment"].items())) + config))
    body = "\n".join(parts)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><title>tomoscale report</title>'
        f"<style>{_STYLE}</style></head><body><main>\n{body}\n</main></body></html>\n"
    )


def text(summary: Mapping[str, Any]) -> str:
    """The same facts for a terminal."""
    fine, tune = summary["finetune"], summary["search"]
    rows = [(r["start"], r["label"], r["dice_mean"], r["dice_sd"], r["hd95_mean"], r["nsd_mean"]) for r in fine["rows"]]
    trials = [
        (t["trial"], t["lr"], t["encoder_lr_scale"], t["epochs"], t["stopped_early"], t["best"]) for t in tune["trials"]
    ]
    return "\n\n".join(
        [
            table(("trial", "lr", "encoder lr x", "epochs", "stopped early", "inner Dice"), trials),
            table(("start", "label", "Dice", "sd", "HD95 mm", "NSD"), rows),
            fine["test"]["statement"],
            table(("stage", "seconds"), [(n, round(s, 1)) for n, s in summary["timings"].items()]),
        ]
    )


def _facts(summary: Mapping[str, Any]) -> str:
    cells = "".join(f"<div><b>{_e(v)}</b><span>{_e(k)}</span></div>" for k, v in summary["headline"].items())
    return f'<div class="facts">{cells}</div>'


def _section(title: str, body: str) -> str:
    return f"<section><h2>{_e(title)}</h2>{body}</section>"


def _figure(png: bytes, caption: str) -> str:
    source = base64.b64encode(png).decode()
    image = f'<img alt="{_e(caption)}" src="data:image/png;base64,{source}">'
    return f"<figure>{image}<figcaption>{_e(caption)}</figcaption></figure>"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    top = "".join(f"<th>{_e(h)}</th>" for h in head)
    body = "".join("<tr>" + "".join(f"<td>{_e(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _e(value: Any) -> str:
    return html.escape(str(value))
