"""The page: one string, whose policy lets nothing but itself run."""

from __future__ import annotations

import base64
import hashlib
import re

from echo import Running

from jaxtune.serving.page import page

HOSTILE = '"><img src=x onerror=alert(1)>\u202e'


def test_the_policy_names_style_and_script_by_hash(echo: Running) -> None:
    response = echo.client.get("/")
    policy = response.headers["content-security-policy"]
    for tag in ("style", "script"):
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", response.text, re.DOTALL)
        assert len(found) == 1
        digest = base64.b64encode(hashlib.sha256(found[0].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    for name in ("x-content-type-options", "referrer-policy", "cross-origin-resource-policy"):
        assert name in response.headers


def test_nothing_is_loaded_and_nothing_is_inline() -> None:
    text, _ = page("tuned, base", ["tuned", "base"], key=False)
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:,)""", text)
    assert not re.findall(r"<[^>]*\s(?:style|on\w+)=", text)
    assert "innerHTML" not in text
    assert "http://" not in text
    assert "https://" not in text


def test_names_are_shown_as_text() -> None:
    text, _ = page(HOSTILE, [HOSTILE], key=False)
    assert "<img" not in text
    assert "\u202e" not in text
    assert "&lt;img src=x" in text


def test_any_number_that_the_api_takes_can_be_sent() -> None:
    """A browser refuses what lies between two steps."""
    text, _ = page("model", ["model"], key=False)
    fields = dict(re.findall(r'<input id="(\w+)" type="number" ([^>]*)placeholder', text))
    assert set(fields) == {"temperature", "top_p", "seed", "max_tokens"}
    for name in ("temperature", "top_p"):
        assert 'step="any"' in fields[name]
    assert 'min="0.01"' not in fields["top_p"]
    for name in ("seed", "max_tokens"):
        assert 'step="1"' in fields[name]
