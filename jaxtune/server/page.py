"""The page at /: one question to every model, answers side by side.

Style and script are inside, and the policy names both by hash, so the browser runs no other and
asks no other server. The script writes what a model says as text, never as HTML.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from markupsafe import Markup

from jaxtune.html import environment, resource, source_hash

_PACKAGE = "jaxtune.server"


def page(title: str, models: Sequence[str], *, key: bool) -> tuple[str, str]:
    """Write the document, and the Content-Security-Policy to send with it.

    `models` are the names in /v1/models, from left to right; `key`: the page asks for the API key.
    """
    style, script = resource(_PACKAGE, "page.css"), resource(_PACKAGE, "page.js")
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src {source_hash(script)}",
            f"style-src {source_hash(style)}",
            "connect-src 'self'",
            "img-src data:",  # the empty icon
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )
    document = (
        environment(_PACKAGE)
        .get_template("page.html.jinja")
        .render(
            title=title,
            models=models,
            models_json=json.dumps(list(models)),
            key=key,
            style=Markup(style),
            script=Markup(script),
        )
    )
    return document, policy
