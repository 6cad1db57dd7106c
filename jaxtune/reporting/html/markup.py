"""The templates of reports, and the style that every page shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from jaxtune.html import environment, escaped, resource


class Number(str):
    """A number as it is to be written; it stands to the right."""


class Table(NamedTuple):
    """A table of a page; it is left out if it has no rows. Headings stand over their numbers."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[object]]


PACKAGE = "jaxtune.reporting.html"
_TEMPLATES = environment(PACKAGE)
_TEMPLATES.tests["numeric"] = lambda value: isinstance(value, int | Number)
_TEMPLATES.tests["markup"] = lambda value: isinstance(value, Markup)
_TEMPLATES.filters["escaped"] = escaped
STYLE = resource(PACKAGE, "page.css")


def render(template: str, **values: Any) -> str:
    """Write a whole page."""
    return _TEMPLATES.get_template(template).render(style=Markup(STYLE), **values)


def part(name: str, *values: Any) -> Markup:
    """Write a part of a page, which is a macro of `parts.html.jinja`."""
    macro = getattr(_TEMPLATES.get_template("parts.html.jinja").module, name)
    return Markup(macro(*values).strip())
