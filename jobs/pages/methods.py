"""What a method is, from its class docstring and the fields of its config: for a terminal, and as pages in Markdown."""

import inspect
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

import ssl_core.methods  # noqa: F401  registers them
from jobs.output import table, wrap, write_page
from ssl_core.methods.base import method_class, method_names

_SECTIONS = {"Idea:": "Idea", "Formula:": "Formula", "Traps:": "Traps", "Cost:": "Cost", "Use it": "When"}
_HEAD = ("setting", "default", "meaning and source")
_BELOW = "as follows"
_MADE = "<!-- Made by `tomoscale methods --markdown --out docs/methods`: change the docstring, not this page. -->"
_MEASURED = "../benchmarks-steps.md#methods"
_SCRATCH = "The control without pre-training needs no job: `none`, random weights, is a start in tune and finetune."


def idea(name: str) -> str:
    """One line: the first paragraph of the method's module."""
    text = inspect.getdoc(inspect.getmodule(method_class(name))) or ""
    line = " ".join(text.split("\n\n", 1)[0].split()).removeprefix(f"{name}: ")
    return line[:1].upper() + line[1:]


def description(name: str) -> str:
    """The class docstring: what it re-implements, idea, formula, traps, cost and when to use it."""
    return inspect.getdoc(method_class(name)) or ""


def when(name: str) -> str:
    """When to use it, in half a sentence: the first of the paragraph that says so, without its first words."""
    paragraph = next((p for p in description(name).split("\n\n") if p.startswith("Use it")), "")
    return " ".join(paragraph.split()).removeprefix("Use it ").partition(". ")[0].removesuffix(".")


def settings(name: str) -> list[tuple[str, str, str]]:
    """(setting, default as YAML, meaning and source); settings within settings follow as `outer.inner`."""
    config = method_class(name).Config
    return list(_rows(config, config(), ""))


def text_page(name: str, width: int) -> str:
    """For a terminal of that width."""
    rows = [(key, wrap(value, 24)) for key, value, _ in settings(name)]
    widths = [max(len(part) for row in [_HEAD, *rows] for part in row[i].split("\n")) for i in (0, 1)]
    left = width - sum(widths) - 4
    full = [(*row, wrap(meaning, left)) for row, (_, _, meaning) in zip(rows, settings(name), strict=True)]
    paragraphs = [idea(name), description(name), f"Cost, measured: docs/benchmarks-steps.md; {_to_measure(name)}"]
    return "\n\n".join([name, *(wrap(text, width) for text in paragraphs), table(_HEAD, full)])


def text_index(width: int) -> str:
    """Every method and its idea, for a terminal of that width."""
    left = width - max(len(name) for name in method_names()) - 2
    rows = table(("method", "idea"), [(name, wrap(idea(name), left)) for name in method_names()])
    return f"{rows}\n\n{wrap(_SCRATCH, width)}"


def markdown_page(name: str) -> str:
    """The page of one method."""
    parts = [_MADE, f"# {name}", f"*{_inline(idea(name), name)}*"]
    for paragraph in description(name).split("\n\n"):
        text = " ".join(paragraph.split())
        start = next((key for key in _SECTIONS if text.startswith(key)), None)
        if start is not None:
            parts.append(f"## {_SECTIONS[start]}")
            text = text.removeprefix(start).strip() if start.endswith(":") else text
        body = _inline(text[:1].upper() + text[1:] if start else text, name)
        if start == "Cost:":
            body += f" [Measured]({_MEASURED}) beside the other methods; {_to_measure(name)}"
        parts.append(body)
    rows = []
    for key, value, meaning in settings(name):
        default = value if value == _BELOW else f"`{value}`"
        rows.append((f"`{key}`", default, _inline(meaning, name).replace("|", "\\|")))
    parts += [
        "## Settings",
        f"Below `method:` of a configuration, beside `name: {name}`.",
        _markdown_table(_HEAD, rows),
    ]
    source = f"[`{_source(name)}`](../../{_source(name)})"
    parts.append(f"Code: {source}. In a terminal: `tomoscale methods {name}`. [All methods](index.md).")
    return "\n\n".join(parts) + "\n"


def markdown_index() -> str:
    """The list of all pages."""
    rows = [
        (f"[`{name}`]({name}.md)", _inline(idea(name), name), _inline(when(name), name).replace("|", "\\|"))
        for name in method_names()
    ]
    parts = [
        _MADE,
        "# Methods",
        "One page for each registered method: idea, formula, traps, cost, when to use it, and every setting with its"
        " source. `tomoscale methods` lists them in a terminal; [a new one](../how-to-add-a-method.md) is one file."
        " [What each learned](../benchmarks-learning.md) in a small study; [what a step"
        " costs](../benchmarks-steps.md#methods).",
        _markdown_table(("method", "idea", "use it"), rows),
        _SCRATCH,
    ]
    return "\n\n".join(parts) + "\n"


def markdown_pages() -> dict[str, str]:
    """All pages by file name."""
    return {"index.md": markdown_index()} | {f"{name}.md": markdown_page(name) for name in method_names()}


def write_pages(folder: Path) -> list[Path]:
    """Write all pages to a folder; pages of methods that are no more are left for their owner to remove."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in markdown_pages().items():
        write_page(folder / file, text)
    return [folder / file for file in markdown_pages()]


def _to_measure(name: str) -> str:
    return f"`tomoscale bench step --methods {name}` measures memory and time of a step on your machine."


def _rows(config: type[BaseModel], values: BaseModel, prefix: str) -> Iterator[tuple[str, str, str]]:
    for key, field in config.model_fields.items():
        value, meaning = getattr(values, key), field.description or ""
        if isinstance(value, BaseModel):
            yield prefix + key, _BELOW, meaning
            yield from _rows(type(value), value, f"{prefix}{key}.")
        else:
            yield prefix + key, _yaml(value), meaning


def _yaml(value: Any) -> str:
    if value is None:
        return "unset"
    text = yaml.safe_dump(to_jsonable_python(value), default_flow_style=True, width=10**6, sort_keys=False)
    return str(text).removesuffix("...\n").strip()


def _inline(text: str, name: str) -> str:
    """Markdown of a paragraph: stars escaped, papers and other methods linked."""
    pieces = re.split(r"(`[^`]*`)", text)
    for i, piece in enumerate(pieces):
        word = piece.strip("`")
        if i % 2 and word != name and word in method_names():
            pieces[i] = f"[{piece}]({word}.md)"
        elif not i % 2:
            safe = re.sub(r"([*\[\]<])", r"\\\1", piece)
            pieces[i] = re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", safe)
    return "".join(pieces)


def _markdown_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _source(name: str) -> str:
    return "/".join(method_class(name).__module__.split(".")) + ".py"
