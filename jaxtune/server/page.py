"""The page at /: one question to every model, answers side by side.

One string: style and script are inside, and the policy names both by hash, so the browser runs no
other and asks no other server. The script writes what a model says as text, never as HTML.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import json
from collections.abc import Sequence

from jaxtune.reporting.html.markup import STYLE, escaped

# name of the field in a request, its label, what may be typed, what stands there while nothing is
_NUMBERS = (
    ("temperature", "Temperature", 'min="0" step="any"', "default"),
    ("top_p", "Top p", 'min="0" max="1" step="any"', "default"),
    ("seed", "Seed", 'min="0" step="1"', "default"),
    ("max_tokens", "Longest answer", 'min="1" step="1"', "tokens"),
)


def page(title: str, models: Sequence[str], *, key: bool) -> tuple[str, str]:
    """The document, and the Content-Security-Policy to send with it.

    `models` are the names in /v1/models, from left to right; `key`: the page asks for the API key.
    """
    style = STYLE + _file("page.css")
    script = _file("page.js")
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
    columns = "\n".join(_column(name) for name in models)
    ask_key = (
        '<label class="wide">API key<input id="key" type="password" autocomplete="off" '
        'spellcheck="false"></label>'
        if key
        else ""
    )
    numbers = "\n".join(_number(*field) for field in _NUMBERS)
    whom = "both" if len(models) == 2 else "something"
    return (
        f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escaped(title)}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body class="talk" data-models="{escaped(json.dumps(list(models)))}">
<a class="skip" href="#question">to the question</a>
<header>
<h1>{escaped(title)}</h1>
<details{" open" if key else ""}>
<summary>Settings</summary>
<div class="settings">
{ask_key}
<label class="wide">System prompt<textarea id="system" rows="2"></textarea></label>
{numbers}
</div>
</details>
</header>
<main class="columns">
{columns}
</main>
<form id="ask">
<label class="unseen" for="question">Question</label>
<textarea id="question" rows="2" placeholder="Ask {whom}" autofocus>
</textarea>
<div class="buttons">
<button type="submit" id="send" class="main">Send</button>
<button type="button" id="stop" disabled>Stop</button>
<button type="button" id="again" disabled>Retry</button>
<button type="button" id="new">New</button>
<span class="hint">Enter sends, Shift+Enter begins a line, Escape stops</span>
</div>
</form>
<noscript>This page needs JavaScript; the API does not.</noscript>
<script>{script}</script>
</body>
</html>
""",
        policy,
    )


def _number(name: str, label: str, limits: str, empty: str) -> str:
    field = f'<input id="{name}" type="number" {limits} placeholder="{empty}">'
    return f"<label>{label}{field}</label>"


def _column(name: str) -> str:
    label = escaped(name)
    return (
        f'<section class="column" aria-label="{label}"><h2>{label}'
        f' <small class="state" role="status"></small></h2>'
        f'<div class="said" role="log" aria-label="conversation with {label}" tabindex="0">'
        '<p class="empty">Nothing said yet.</p></div></section>'
    )


def _file(name: str) -> str:
    return importlib.resources.files("jaxtune.server").joinpath(name).read_text("utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
