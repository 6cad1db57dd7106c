"""Pages for a browser: every value is escaped, and only code that is named by its hash may run.

Text of a data set or of a model is hostile. It reaches a page through a template, which escapes it
and shows control characters as pictures; only `Markup` made by a page stays as it is.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources

import jinja2
from markupsafe import Markup, escape

from jaxtune.terminal.text import printable


def escaped(value: object) -> Markup:
    """Escape a value for content and quoted attributes; show control characters as pictures."""
    return value if isinstance(value, Markup) else escape(printable(str(value)))


def resource(package: str, name: str) -> str:
    """Read a file that lies in a package."""
    return importlib.resources.files(package).joinpath(name).read_text("utf-8")


def environment(package: str) -> jinja2.Environment:
    """Make the environment of the templates that lie in a package."""
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: resource(package, name)),
        autoescape=True,
        finalize=escaped,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def source_hash(code: str) -> str:
    """Name a script or a style for a Content-Security-Policy, which lets no other run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'"
