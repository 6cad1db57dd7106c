"""Templates of the pages: every value is escaped, and the style that every page shares.

Text of a data set or of a model is hostile. It reaches a page through a template, which escapes it
and shows control characters as pictures; only `Markup` made here stays as it is.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup, escape

from jaxtune.terminal.text import printable


class Number(str):
    """A number as it is to be written; it stands to the right."""


class Table(NamedTuple):
    """A table of a page; it is left out if it has no rows. Headings stand over their numbers."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[object]]


def escaped(value: object) -> Markup:
    """Escape a value for content and quoted attributes; show control characters as pictures."""
    return value if isinstance(value, Markup) else escape(printable(str(value)))


def resource(name: str) -> str:
    """Read a file of this package."""
    return importlib.resources.files(__package__).joinpath(name).read_text("utf-8")


_TEMPLATES = jinja2.Environment(
    loader=jinja2.FunctionLoader(resource),
    autoescape=True,
    finalize=escaped,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.tests["numeric"] = lambda value: isinstance(value, int | Number)
_TEMPLATES.tests["markup"] = lambda value: isinstance(value, Markup)
_TEMPLATES.filters["escaped"] = escaped
STYLE = resource("page.css")


def render(template: str, **values: Any) -> str:
    """Write a whole page."""
    return _TEMPLATES.get_template(template).render(style=Markup(STYLE), **values)


def part(name: str, *values: Any) -> Markup:
    """Write a part of a page, which is a macro of `parts.html.jinja`."""
    macro = getattr(_TEMPLATES.get_template("parts.html.jinja").module, name)
    return Markup(macro(*values).strip())
