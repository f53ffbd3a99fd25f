"""The demo's report: one HTML file that needs nothing else, and the same facts as a table in the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt

from jobs.output import table
from jobs.pages.html import COLOURS, INK, chart, escape, figure, headline, html_table, page, section


def loss_figure(points: Sequence[Sequence[Any]]) -> bytes:
    """PNG of the loss terms over steps; `points` are journal items [step, ms, metrics]."""
    names = sorted({k for _, _, m in points for k in m if k == "loss" or k.startswith("loss/")})
    if len(names) == 2:  # a single term is the loss itself
        names = ["loss"]
    drawing, axis = plt.subplots(figsize=(7.2, 2.9))
    for number, name in enumerate(names):
        xy = [(s, m[name]) for s, _, m in points if name in m]
        label = "total" if name == "loss" else name.removeprefix("loss/")
        axis.plot(*zip(*xy, strict=True), color=COLOURS[number % len(COLOURS)], label=label, lw=1.8, marker="o", ms=2.5)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("loss")
    if len(names) > 1:
        axis.legend(frameon=False)
    return chart(drawing, [axis])


def dice_figure(cases: Sequence[Mapping[str, Any]]) -> bytes:
    """PNG of Dice per test subject, mean over labels and seeds, one box and its points a start, pairs joined."""
    starts = list(dict.fromkeys(c["start"] for c in cases))
    subjects = sorted({c["subject"] for c in cases})
    values = {s: np.array([_mean_dice(cases, s, who) for who in subjects]) for s in starts}
    drawing, axis = plt.subplots(figsize=(7.2, 3.2))
    jitter = np.random.default_rng(0).uniform(-0.07, 0.07, len(subjects))
    if len(starts) == 2:
        for i in range(len(subjects)):
            pair = [values[s][i] for s in starts]
            axis.plot([1 + jitter[i], 2 + jitter[i]], pair, color="#9aa3af", lw=0.6, alpha=0.55, zorder=1)
    for i, start in enumerate(starts, 1):
        axis.boxplot(
            values[start],
            positions=[i],
            widths=0.34,
            showfliers=False,
            medianprops={"color": INK, "lw": 1.6},
            boxprops={"color": INK},
            whiskerprops={"color": INK},
            capprops={"color": INK},
        )
        axis.scatter(i + jitter, values[start], s=15, color=COLOURS[(i - 1) % len(COLOURS)], alpha=0.85, zorder=3, lw=0)
    axis.set_xticks(range(1, len(starts) + 1), starts)
    axis.set_ylabel("Dice of a test subject\n(mean of labels and seeds)")
    return chart(drawing, [axis])


def _mean_dice(cases: Sequence[Mapping[str, Any]], start: str, subject: str) -> float:
    return float(np.mean([c["dice"] for c in cases if c["start"] == start and c["subject"] == subject]))


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
        f'<p class="lead">{escape(data["description"])}; {escape(summary["created"])}.</p>',
    ]
    if data["simulated"]:
        parts.append(
            '<p class="note">These subjects are <b>simulated</b>: one real head template and its atlas labels,'
            " warped at random. The numbers show that the machinery works; they say nothing of real patients.</p>"
        )
    parts.append(headline(summary["headline"]))
    parts.append(
        section(
            "What the numbers say",
            f'<p class="say">{escape(fine["test"]["statement"])}</p>'
            + (f"<p>{escape(caution)}</p>" if (caution := _searched_for_one(tune)) else "")
            + figure(dice_figure(fine["cases"]), "Each dot is a held-out subject; grey lines join the same subject.")
            + html_table(
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
    shown = "".join(figure(pictures[n], captions.get(n, "")) for n in previews)
    predict = summary["predict"]
    shown += f"<p>Predicted from the registry: <code>{escape(predict['model'])}</code>"
    shown += f" on <code>{escape(predict['input'])}</code>,"
    shown += f" written to <code>{escape(predict['output'])}</code> with the same shape and affine.</p>"
    parts.append(section("Predictions on held-out subjects", shown))
    pre_text = (
        f"<p>{escape(pre['method'])}, {pre['steps']} steps of {pre['global_batch']} crops on {pre['workers']} Ray Train"
        f" workers; {pre['samples_per_s']:.2f} samples/s, data wait {100 * pre['wait_share']:.1f} % of the step time."
        f' <a href="{escape(pre["run_url"])}">MLflow run</a>, model <code>{escape(pre["model"])}</code>.</p>'
    )
    parts.append(section("Pre-training without labels", pre_text + figure(loss_figure(pre["points"]), "Loss by step.")))
    if "views" in pictures:
        parts.append(
            section("Two views and the region they share", figure(pictures["views"], captions.get("views", "")))
        )
    rows = [
        (
            t["trial"],
            t["encoder"],
            f"{t['lr']:.2e}",
            f"{t['encoder_lr_scale']:g}",
            f"{t['epochs']} of {tune['epochs']}" + (" (stopped early)" if t["stopped_early"] else ""),
            f"{t['last']:.3f}" if t["status"] == "done" and t["last"] is not None else t["status"],
        )
        for t in tune["trials"]
    ]
    head = ("trial", "encoder", "lr", "encoder lr ×", "epochs", "inner Dice, last epoch")
    parts.append(
        section("Search on the inner split", html_table(head, rows) + f"<p>Chosen: {escape(tune['chosen'])}.</p>")
    )
    orphans = "".join(f"<li>{escape(o)}</li>" for o in data["notes"])
    volumes = f"<p>{escape(data['text'])}</p>" + (f"<ul>{orphans}</ul>" if orphans else "")
    parts.append(section("Data", volumes + html_table(("fact", "value"), list(data["facts"].items()))))
    parts.append(
        section("Time", html_table(("stage", "seconds"), [(n, f"{s:.1f}") for n, s in summary["timings"].items()]))
    )
    links = "".join(f'<li>{escape(n)}: <a href="{escape(u)}">{escape(u)}</a></li>' for n, u in summary["links"].items())
    links = f"<ul>{links}</ul><p>The links work while the stack is up (<code>tomoscale demo --keep</code>).</p>"
    parts.append(section("Where things are", links))
    config = f"<details><summary>Resolved configuration</summary><pre>{escape(summary['config'])}</pre></details>"
    parts.append(section("Environment", html_table(("what", "found"), list(summary["environment"].items())) + config))
    return page("tomoscale report", parts)


def _searched_for_one(tune: Mapping[str, Any]) -> str:
    """What the reader of a comparison should know of a search in which one side took no part."""
    if any(t["encoder"] == "none" for t in tune["trials"]):
        return ""
    return (
        "All starts got the settings that the search found for the encoder; random weights had no search of their own."
    )


def text(summary: Mapping[str, Any]) -> str:
    """The same facts for a terminal."""
    fine, tune = summary["finetune"], summary["search"]
    rows = [(r["start"], r["label"], r["dice_mean"], r["dice_sd"], r["hd95_mean"], r["nsd_mean"]) for r in fine["rows"]]
    trials = [
        (t["trial"], t["lr"], t["encoder_lr_scale"], t["epochs"], t["stopped_early"], t["last"], t["status"])
        for t in tune["trials"]
    ]
    return "\n\n".join(
        [
            table(("trial", "lr", "encoder lr x", "epochs", "stopped early", "inner Dice, last", "ended"), trials),
            table(("start", "label", "Dice", "sd", "HD95 mm", "NSD"), rows),
            "\n".join(line for line in (fine["test"]["statement"], _searched_for_one(tune)) if line),
            table(("stage", "seconds"), [(n, round(s, 1)) for n, s in summary["timings"].items()]),
        ]
    )
