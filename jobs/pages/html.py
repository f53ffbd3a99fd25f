"""HTML pages from the templates beside this file: one file each, which needs no script, request or font."""

import base64
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Picture:
    """A PNG and its caption."""

    png: bytes
    caption: str

    @property
    def source(self) -> str:
        """The picture as an address that holds it."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


@cache
def environment() -> jinja2.Environment:
    """Templates whose values are escaped, and whose unknown names are errors."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters["prose"] = prose
    return made


def prose(text: str) -> Markup:
    """A sentence whose words between backticks are code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def page(template: str, **values: Any) -> str:
    """A template filled in."""
    return environment().get_template(template).render(**values)
