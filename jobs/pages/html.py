"""The frame and the parts of HTML pages that are one file and need nothing else: no scripts, no requests, no fonts."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = ("#2f6f9f", "#c2703d", "#5b8c5a", "#8a5a9e")
INK = "#3b4350"

_STYLE = """
:root{color-scheme:light dark;
  --ink:#1f2733;--soft:#5c6675;--line:#dfe3e8;--page:#f6f7f9;--card:#fff;--accent:#2f6f9f;--warn:#8a4b12;--warnbg:#fdf3e7}
@media(prefers-color-scheme:dark){:root{
  --ink:#e3e7ed;--soft:#a0aab8;--line:#323a45;--page:#12161c;--card:#1b2129;--accent:#74b3e2;--warn:#f0bd80;--warnbg:#33271a}}
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
.wide{overflow-x:auto;margin:0 0 12px}
@media(max-width:640px){section{padding:16px 14px}th,td{white-space:nowrap}}
img{max-width:100%;height:auto;display:block;margin:0 auto;border-radius:6px}
figure{margin:0 0 14px}
figcaption{color:var(--soft);font-size:13px;margin-top:6px}
.note{background:var(--warnbg);color:var(--warn);border-radius:8px;padding:10px 14px;margin:0 0 18px}
.say{border-left:3px solid var(--accent);padding-left:12px}
pre{background:var(--page);border:1px solid var(--line);border-radius:8px;padding:12px;overflow:auto;
  font-size:12.5px;line-height:1.45;max-height:420px}
code{font-size:13px;overflow-wrap:anywhere}
details summary{cursor:pointer;color:var(--accent)}
a{color:var(--accent);overflow-wrap:anywhere}
.thumbs{display:grid;grid-template-columns:repeat(auto-fill,minmax(148px,1fr));gap:14px}
.thumbs figure{margin:0}
.thumbs img{width:100%;aspect-ratio:1;object-fit:contain;background:#0d1117}
.thumbs figcaption{overflow-wrap:anywhere;line-height:1.35}
"""


def page(title: str, parts: Sequence[str]) -> str:
    """The whole document."""
    body = "\n".join(parts)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><main>\n{body}\n</main></body></html>\n"
    )


def headline(values: Mapping[str, Any]) -> str:
    """Cards: a value over its name."""
    cells = "".join(f"<div><b>{escape(v)}</b><span>{escape(k)}</span></div>" for k, v in values.items())
    return f'<div class="facts">{cells}</div>'


def section(title: str, body: str) -> str:
    """A titled card; `body` is HTML."""
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def figure(png: bytes, caption: str) -> str:
    """A picture held in the page, with its caption."""
    source = base64.b64encode(png).decode()
    image = f'<img alt="{escape(caption)}" src="data:image/png;base64,{source}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def html_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table of plain values, which scrolls by itself where the page is narrower."""
    top = "".join(f"<th>{escape(h)}</th>" for h in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def escape(value: Any) -> str:
    """The value's text as HTML."""
    return html.escape(str(value))


def chart(drawing: Any, axes: Sequence[Any], grid: str = "y") -> bytes:
    """PNG of a matplotlib figure in the pages' style, which is closed."""
    for axis in axes:
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        axis.grid(axis=grid, color="#e6e9ed", lw=0.8)
        axis.set_axisbelow(True)
    drawing.tight_layout()
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", dpi=160)
    plt.close(drawing)
    return buffer.getvalue()
