"""A template: what it was resolved from, its jinja, and how its answers end.

A name, the tokenizer's own, a string with placeholders or a jinja file all become one `Template`;
every one is jinja (ours come from `builtin_templates` and `format_string`) and is rendered as
transformers renders it. What of the rendered text is trained is decided in `masking`.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune.config import ConfigError, nearest
from jaxtune.data.schema import Message
from jaxtune.data.templating import builtin_templates, format_string, jinja
from jaxtune.data.templating.builtin_templates import BUILTIN, TemplateStrings
from jaxtune.data.templating.format_string import Placeholders
from jaxtune.data.templating.literal_special_tokens import strings as strings_in
from jaxtune.data.templating.rendered_checks import squeeze
from jaxtune.data.tokenizer import Tokenizer

# What `strftime_now` tells: the date Llama 3.1's template falls back to. Only that it never moves
# matters; a template that asks for today would otherwise make other tokens every day.
DATE = datetime.date(2024, 7, 26)


# A turn that is rendered to see what a template makes of one.
QUESTION, ANSWER = Message("user", "jaxtuneasks"), Message("assistant", "jaxtunesays")


class SpecialTokenInKwargs(jinja.TemplateFailed):
    """A refusal of arguments whose text has a special token: it could not stay text."""

    reason = "chat_template_kwargs holds a special token"


class TemplateRequest(NamedTuple):
    """A template's fields of the config, from which it was resolved."""

    template: str
    system_prompt: str | None
    stop: str | None
    no_input: str | None


@dataclass(frozen=True)
class Template:
    """A chat template and how its answers end."""

    name: str
    jinja: str
    stop: str  # text of the end of turn
    stop_id: int
    ours: bool  # written here: trusted, and brings the system prompt itself
    system_prompt: str
    opening: str  # before a `Document`: bos where the tokenizer puts one before plain text
    closing: str  # after a `Document`: eos
    named: Mapping[str, str]  # bos_token, eos_token, ... as the template's variables
    special_pattern: re.Pattern[str]  # the special tokens that steer where the template writes one
    request: TemplateRequest
    date: datetime.date = DATE
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # chat_template_kwargs

    def for_conversation(self, kwargs: Mapping[str, Any]) -> Template:
        """Return the template as a conversation with arguments of its own has it.

        Raises `jinja.TemplateFailed` where they would write a special token.
        """
        if not kwargs:
            return self
        if found := self.special_pattern.search("\0".join(strings_in(kwargs))):
            raise SpecialTokenInKwargs(f"{found[0]!r}; it would steer the model. Take it out")
        return dataclasses.replace(self, kwargs={**self.kwargs, **kwargs})

    @property
    def chat_template(self) -> str:
        """Return what an export writes: with the system prompt that `text` puts before the
        messages.
        """
        if self.ours or not self.system_prompt:
            return self.jinja
        prompt = json.dumps({"role": "system", "content": self.system_prompt}, ensure_ascii=False)
        # The line end goes with the tag before it, as everywhere with chat templates.
        return (
            "{% if not messages or messages[0]['role'] != 'system' %}"
            "{% set messages = [" + prompt + "] + (messages | list) %}{% endif %}\n" + self.jinja
        )

    @property
    def fingerprint(self) -> str:
        parts = [self.jinja, self.stop, self.system_prompt, self.opening, self.closing]
        parts += [str(self.ours), str(self.date), str(sorted(self.named.items()))]
        parts += [json.dumps(self.kwargs)] if self.kwargs else []
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    @functools.cached_property
    def reads_input(self) -> bool:
        """Tell whether it places a message's `input` itself, as ours do, exported ones too."""
        return re.search(r"""message(\.input\b|\[['"]input['"]\])""", self.jinja) is not None

    def text(
        self,
        messages: Sequence[Message],
        tools: Any = None,
        *,
        prompt: bool = False,
        marked: bool = False,
    ) -> str:
        """Render the conversation, with the generation prompt, or with marks around `{% generation
        %}`.

        Raises `jinja.TemplateFailed`.
        """
        plain: list[dict[str, Any]] = []
        brings_none = not messages or messages[0].role != "system"
        if not self.ours and self.system_prompt and brings_none:
            plain.append({"role": "system", "content": self.system_prompt})
        for message in messages:
            content, own_input = message.content, message.input
            if own_input and not self.reads_input:
                content, own_input = "\n".join(filter(None, (content, own_input))), ""
            beside = {"input": own_input} if own_input else {}
            plain.append({"role": message.role, "content": content, **beside, **message.extra})
        return jinja.render(
            self.jinja,
            plain,
            tools=tools,
            add_generation_prompt=prompt,
            date=self.date,
            named={**self.named, **self.kwargs},
            marked=marked,
            trusted=self.ours,
        )


def resolve(
    template: str,
    tokenizer: Tokenizer,
    *,
    system_prompt: str | None = None,
    stop: str | None = None,
    no_input: str | None = None,
    date: datetime.date = DATE,
    kwargs: Mapping[str, Any] | None = None,
) -> Template:
    """Resolve `auto`, `chat`, a name, a string with placeholders, a .jinja file or jinja itself.

    `no_input` is what a string with {input} becomes where a record has none; `kwargs` are the
    arguments that a chat template reads. Raises `ConfigError`
    when the template is unknown, the tokenizer lacks a token it needs, or an answer would not end
    with exactly one token of the tokenizer.
    """
    request = TemplateRequest(template, system_prompt, stop, no_input)
    if template == "auto":
        template = "chat" if tokenizer.chat_template else "alpaca"
    if no_input is not None and (template in BUILTIN or "{input}" not in template):
        raise ConfigError("template_no_input: the template is no string with {input}. Unset it.")
    bos = (tokenizer.bos_token or "") if tokenizer.begins_with_bos else ""
    strings = TemplateStrings(bos, stop or "", system_prompt or "")
    foreign = False
    if template in BUILTIN:
        source = _builtin(template, strings, tokenizer)
    elif _is_jinja(template) or template == "chat":
        source, foreign = _foreign(template, tokenizer), True
    elif "{" in template:
        source = _format_string(template, no_input, strings, tokenizer)
    else:
        names = ["auto", "chat", *BUILTIN]
        raise ConfigError(
            f"template: '{template}' is not known.{nearest(template, names)} There are: "
            f"{', '.join(names)}, a .jinja file, or a string with {{instruction}} and {{output}}."
        )
    resolved = Template(
        name=source.name,
        jinja=source.jinja,
        stop=source.stop,
        stop_id=tokenizer.special_tokens.get(source.stop, -1),
        ours=not foreign,
        system_prompt=strings.system,
        opening=bos,
        closing=tokenizer.eos_token or source.stop,
        named=tokenizer.named,
        special_pattern=tokenizer.special_pattern,
        request=request,
        date=date,
        kwargs=kwargs or {},
    )
    return _probed(resolved, tokenizer, stop) if foreign else resolved


class _Source(NamedTuple):
    """A template's jinja before what it does is known; `stop` is empty where a probe will tell."""

    name: str
    jinja: str
    stop: str


def _builtin(name: str, strings: TemplateStrings, tokenizer: Tokenizer) -> _Source:
    """Read a built-in template; `strings.stop` is empty where the template decides."""
    needed = needed_tokens(name, stop=strings.stop)
    missing = [token for token in needed if token not in tokenizer.special_tokens]
    if missing:
        raise ConfigError(
            f"template '{name}' needs special tokens that this tokenizer lacks: "
            f"{', '.join(missing)}. Set add_tokens: true to add them (the embedding grows "
            "where it has no rows left for them), or choose a template written in plain text, "
            "such as alpaca or llama2."
        )
    stop = _stop_token(strings.stop or BUILTIN[name].stop or tokenizer.eos_token, tokenizer)
    return _Source(name, builtin_templates.source(name, strings._replace(stop=stop)), stop)


def _format_string(
    text: str, no_input: str | None, strings: TemplateStrings, tokenizer: Tokenizer
) -> _Source:
    """Turn a string with placeholders into jinja; `strings.stop` as in `_builtin`."""
    parts = format_string.parse(text)
    if strings.system and "system" not in parts.names:
        raise ConfigError("system_prompt: the template has no {system}. Add it, or unset.")
    lead_out, stop, rest = _end_of_answer(parts.after, strings.stop or None, tokenizer)
    source = format_string.source(
        parts,
        strings._replace(stop=stop),
        lead_out=lead_out,
        rest=rest,
        special=tokenizer.special_pattern,
        without_input=_without_input(parts, no_input),
    )
    return _Source("custom", source, stop)


def variant(
    base: Template, tokenizer: Tokenizer, *, template: str | None, system_prompt: str | None
) -> Template:
    """Resolve `base` with what one dataset has instead: another template, another system prompt."""
    if template is None and system_prompt is None:
        return base
    request = base.request
    return resolve(
        request.template if template is None else template,
        tokenizer,
        system_prompt=request.system_prompt if system_prompt is None else system_prompt,
        stop=request.stop,
        no_input=request.no_input if template is None else None,
        date=base.date,
        kwargs=base.kwargs,
    )


def needed_tokens(template: str, *, stop: str | None = None) -> tuple[str, ...]:
    """List the special tokens that a named template writes; none if it is another kind."""
    if template not in BUILTIN:
        return ()
    choice = BUILTIN[template]
    end = choice.stop if choice.stop and not stop else None
    return tuple(dict.fromkeys((*choice.needs, *([end] if end else []))))


def tokens_to_add(
    wanted: bool | Sequence[str], templates: Iterable[str], *, stop: str | None = None
) -> tuple[str, ...]:
    """List the special tokens that `add_tokens` names: those of the templates, or a list."""
    if not isinstance(wanted, bool):
        return tuple(wanted)
    needed = [token for name in templates for token in needed_tokens(name, stop=stop)]
    return tuple(dict.fromkeys(needed)) if wanted else ()


def _without_input(parts: Placeholders, no_input: str | None) -> Placeholders | None:
    if no_input is None:
        return None
    other = format_string.parse(no_input)
    if "input" in other.names:
        raise ConfigError("template_no_input: holds {input}, but is for records without one.")
    if other.after != parts.after:
        raise ConfigError(
            f"template_no_input: ends with {other.after!r} behind {{output}}, the template with "
            f"{parts.after!r}; answers must end the same way."
        )
    return other


def _stop_token(stop: str | None, tokenizer: Tokenizer) -> str:
    """Return `stop`, proven to be one special token of the tokenizer."""
    if not stop:
        raise ConfigError(
            "stop: the tokenizer names no eos_token, so nothing would end an answer. Set stop to "
            f"one of its special tokens: {_some(tokenizer.special_tokens)}."
        )
    if stop not in tokenizer.special_tokens:
        pieces = len(tokenizer.encode(stop))
        raise ConfigError(
            f"stop: {stop!r} is not a special token of the tokenizer (as text it is {pieces} "
            f"token{'s' if pieces != 1 else ''}), so generation could not stop at it exactly. Set "
            f"stop to one of: {_some(tokenizer.special_tokens)}."
        )
    return stop


def _some(tokens: Mapping[str, int]) -> str:
    shown = sorted(tokens, key=lambda token: tokens[token])[:8]
    return (", ".join(shown) or "(it has none)") + (", ..." if len(tokens) > len(shown) else "")


def _end_of_answer(after: str, stop: str | None, tokenizer: Tokenizer) -> tuple[str, str, str]:
    """Cut text behind {output} into (blanks, end of turn, rest). Exactly one end of turn comes of
    it.
    """
    blanks = after[: len(after) - len(after.lstrip())]
    written = tokenizer.special_pattern.match(after, len(blanks))
    if stop and after.startswith(stop, len(blanks)):
        end = _stop_token(stop, tokenizer)
    elif written and not stop and written[0] != tokenizer.bos_token:
        end = written[0]
    else:
        return "", _stop_token(stop or tokenizer.eos_token, tokenizer), after
    return blanks, end, after[len(blanks) + len(end) :]


def _is_jinja(template: str) -> bool:
    return template.endswith(".jinja") or bool(re.search(r"\{%|\{\{.*\bmessages?\b", template))


def _foreign(template: str, tokenizer: Tokenizer) -> _Source:
    """Read a template that is not ours."""
    if template == "chat":
        if not tokenizer.chat_template:
            raise ConfigError(
                f"template 'chat': the tokenizer in {tokenizer.folder} has no chat template. "
                f"Choose one of: {', '.join(BUILTIN)}."
            )
        return _Source("chat", tokenizer.chat_template, "")
    if not template.endswith(".jinja"):
        return _Source("custom", template, "")
    try:
        source = Path(template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"template: {template}: cannot be read: {error}.") from None
    return _Source(Path(template).name, source, "")


def _probed(template: Template, tokenizer: Tokenizer, stop: str | None) -> Template:
    """Learn how a foreign template ends an answer, by rendering one."""
    try:
        text = dataclasses.replace(template, system_prompt="").text((QUESTION, ANSWER))
    except jinja.TemplateFailed as error:
        raise ConfigError(f"template '{template.name}' cannot be rendered: {error}") from None
    head, found, tail = text.rpartition(ANSWER.content)
    if not found or QUESTION.content not in head:
        raise ConfigError(
            f"template '{template.name}' does not show a question and its answer; "
            f"it renders them as {text[:80]!r}."
        )
    behind = tail.lstrip()
    written = tokenizer.special_pattern.match(behind)
    end = stop if stop and behind.startswith(stop) else (written[0] if written else None)
    if end is None or (stop and end != stop):
        raise ConfigError(
            f"template '{template.name}' puts {behind[:20]!r} after an answer; expected "
            f"{repr(stop) if stop else 'a special token of the tokenizer'}, so that the model "
            "learns to stop. Set stop to what the template writes there, or choose another."
        )
    if template.system_prompt:
        try:
            shown = template.text((QUESTION,), prompt=True)
        except jinja.TemplateFailed as error:
            raise ConfigError(
                f"system_prompt: template '{template.name}' refuses it: {error}"
            ) from None
        if squeeze(template.system_prompt) not in squeeze(shown):
            raise ConfigError(f"system_prompt: template '{template.name}' does not show it. Unset.")
    _stop_token(end, tokenizer)
    return dataclasses.replace(template, stop=end, stop_id=tokenizer.special_tokens[end])
