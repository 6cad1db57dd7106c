"""The page at /: one question to every model, answers side by side.

Style and script are inside, and the policy names both by hash, so the browser runs no other and
asks no other server. The script writes what a model says as text, never as HTML.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import json
from collections.abc import Sequence

import jinja2
from markupsafe import Markup, escape

from jaxtune.terminal.text import printable


def page(title: str, models: Sequence[str], *, key: bool) -> tuple[str, str]:
    """Write the document, and the Content-Security-Policy to send with it.

    `models` are the names in /v1/models, from left to right; `key`: the page asks for the API key.
    """
    style, script = _file("page.css"), _file("page.js")
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src '{_hash(script)}'",
            f"style-src '{_hash(style)}'",
            "connect-src 'self'",
            "img-src data:",  # the empty icon
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )
    templates = jinja2.Environment(
        autoescape=True,
        finalize=_escaped,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    document = templates.from_string(_file("page.html.jinja")).render(
        title=title,
        models=models,
        models_json=json.dumps(list(models)),
        key=key,
        style=Markup(style),
        script=Markup(script),
    )
    return document, policy


def _escaped(value: object) -> Markup:
    """Escape a value for content and quoted attributes; show control characters as pictures."""
    return value if isinstance(value, Markup) else escape(printable(str(value)))


def _file(name: str) -> str:
    return importlib.resources.files("jaxtune.server").joinpath(name).read_text("utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
