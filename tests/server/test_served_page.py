"""The page: one string, whose policy lets nothing but itself run."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from typing import Any

import pytest
from echo import Running

from jaxtune.server.page import page

# What the script needs of a browser, and no more. Prints the bodies that were sent.
BROWSER = """
const heard = {}, sent = [], found = {};
const element = (id) => ({
  id, value: "", dataset: { models: '["model"]' }, classList: { add() {}, remove() {} },
  addEventListener: (what, then) => { heard[`${id} ${what}`] = then; },
  querySelector: (name) => name === ".empty" ? null : element(name),
  querySelectorAll: () => [], append() {}, remove() {}, focus() {}, replaceChildren() {},
});
globalThis.document = {
  ...element("document"), body: element("body"), createElement: element,
  getElementById: (id) => found[id] ??= element(id),
  querySelectorAll: () => [element("column")], querySelector: () => null,
};
globalThis.fetch = async (_, { body }) => {
  sent.push(JSON.parse(body));
  const choices = [{ delta: { content: "Yes" }, finish_reason: "stop" }];
  const said = `data: ${JSON.stringify({ choices })}\\n\\ndata: [DONE]\\n\\n`;
  return new Response(said);
};
const at = document.getElementById;
const turn = () => new Promise((then) => setTimeout(then, 50));
const ask = async (text) => {
  at("question").value = text;
  heard["ask submit"]({ preventDefault() {} });
  await turn();
};
const retry = async () => { heard["again click"](); await turn(); };
"""

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


def sent(script: str) -> list[Any]:
    text, _ = page("model", ["model"], key=False)
    own = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)[0]
    program = f"{BROWSER}{own}\n(async () => {{ {script}; console.log(JSON.stringify(sent)); }})();"
    done = subprocess.run(["node", "-e", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_retry_is_another_draw() -> None:
    bodies = sent('await ask("Hi"); await retry(); await retry(); await ask("So")')
    said = [[message["content"] for message in body["messages"]] for body in bodies]
    assert said == [["Hi"], ["Hi"], ["Hi"], ["Hi", "Yes", "So"]]
    seeds = [body.get("seed") for body in bodies]
    assert (seeds[0], seeds[3]) == (None, None)
    assert len({*seeds[:3]}) == 3
    typed = 'at("seed").value = "7"; await ask("Hi"); await retry(); await retry(); await ask("So")'
    assert [body["seed"] for body in sent(typed)] == [7, 8, 9, 7]
