"""The jinja that chat templates are written in, rendered exactly as transformers renders it.

Same sandbox, same filters and globals, with two differences. `strftime_now` tells a date that is
passed in, so that the same data is the same tokens tomorrow. A template that jaxtune itself wrote
is trusted, and rendered without the sandbox: the same text in half the time. The tests hold the
text against `apply_chat_template`.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.defaults
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

# Stand around what `{% generation %}` holds when it is rendered with marks.
_OPEN, _CLOSE = "\U0010fff0", "\U0010fff1"


class TemplateFailed(Exception):
    """A conversation that the template refused (`raise_exception`), or a broken template."""

    reason = "the template refuses the conversation"


class _GenerationTag(jinja2.ext.Extension):
    """A tag `{% generation %}...{% endgeneration %}`, rendered as what it holds, between marks if
    asked.
    """

    tags = {"generation"}  # noqa: RUF012 - declared so by jinja

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        if not self.environment.globals.get("generation_marks"):
            return body
        opening, closing = (
            jinja2.nodes.Output([jinja2.nodes.TemplateData(mark)]) for mark in (_OPEN, _CLOSE)
        )
        return [opening, *body, closing]


def has_marks(source: str) -> bool:
    return re.search(r"\{%[-+]?\s*generation\b", source) is not None


def take_marks(text: str) -> tuple[str, list[tuple[int, int]]]:
    """Take the marks out of rendered text: the text without them, and what they enclose as (start,
    end).

    >>> take_marks("Q A: " + _OPEN + "yes" + _CLOSE)
    ('Q A: yes', [(5, 8)])
    """
    plain, marks, start = "", [], 0
    for part in re.split(f"([{_OPEN}{_CLOSE}])", text):
        if part == _OPEN:
            start = len(plain)
        elif part == _CLOSE:
            marks.append((start, len(plain)))
        else:
            plain += part
    return plain, marks


@functools.lru_cache(maxsize=32)
def arguments(source: str) -> frozenset[str]:
    """Name the variables that a template reads and does not always set itself."""
    try:
        names = jinja2.meta.find_undeclared_variables(_parse(source))
    except jinja2.TemplateSyntaxError:  # rendering says it
        return frozenset()
    return frozenset(names - set(jinja2.defaults.DEFAULT_NAMESPACE))


def options(source: str) -> frozenset[str]:
    """Name those of `arguments` that are clearly meant to be given: tested for, or never set."""
    tree = _parse(source)
    nodes = [*tree.find_all((jinja2.nodes.Test, jinja2.nodes.Filter))]
    tested = [n.node for n in nodes if n.name in ("defined", "undefined", "default", "d")]
    names = {node.name for node in tested if isinstance(node, jinja2.nodes.Name)}
    stored = {node.name for node in tree.find_all(jinja2.nodes.Name) if node.ctx != "load"}
    return frozenset(name for name in arguments(source) if name in names or name not in stored)


@functools.lru_cache(maxsize=64)
def compared(source: str, name: str) -> frozenset[str]:
    """Name the strings with which a template compares a variable, attribute or key called `name`.

    >>> sorted(compared("{% if m.role in ['tool', 'ipython'] or m['role'] == 'user' %}{% endif %}",
    ...                 "role"))
    ['ipython', 'role', 'tool', 'user']
    """
    found: set[str] = set()
    try:
        tree = _parse(source)
    except jinja2.TemplateSyntaxError:  # rendering says it
        return frozenset()
    for comparison in tree.find_all(jinja2.nodes.Compare):
        constants = [c.value for c in comparison.find_all(jinja2.nodes.Const)]
        named = [v.name for v in comparison.find_all(jinja2.nodes.Name)]
        named += [v.attr for v in comparison.find_all(jinja2.nodes.Getattr)]
        if name in (*constants, *named):
            found.update(text for text in constants if isinstance(text, str))
    return frozenset(found)


def _parse(source: str) -> jinja2.nodes.Template:
    extensions = [_GenerationTag, jinja2.ext.loopcontrols]
    return jinja2.Environment(extensions=extensions).parse(source)


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON as it is: jinja's own filter escapes HTML, and prompts are not HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@functools.lru_cache(maxsize=32)
def _compile(source: str, date: datetime.date, marked: bool, trusted: bool) -> jinja2.Template:
    kind = jinja2.Environment if trusted else jinja2.sandbox.ImmutableSandboxedEnvironment
    environment = kind(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["generation_marks"] = marked
    environment.globals["strftime_now"] = lambda form: date.strftime(form)
    compiled = environment.from_string(source)
    # Copied at every rendering; a plain dict is copied several times faster than jinja's own chain.
    compiled.globals = dict(compiled.globals)
    return compiled


def render(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Any] | None = None,
    add_generation_prompt: bool,
    date: datetime.date,
    named: Mapping[str, Any],
    marked: bool = False,
    trusted: bool = False,
) -> str:
    """Render a conversation; `named` are bos_token, eos_token, ... and the template's arguments.

    Raises `TemplateFailed`.
    """
    try:
        return _compile(source, date, marked, trusted).render(
            messages=[dict(message) for message in messages],
            tools=None if tools is None else list(tools),
            add_generation_prompt=add_generation_prompt,
            **{"documents": None, **named},
        )
    except jinja2.TemplateSyntaxError as error:
        raise TemplateFailed(f"line {error.lineno}: {error.message}") from None
    except Exception as error:  # a template is a program; whatever it does wrong is its message
        raise TemplateFailed(str(error) or type(error).__name__) from None
