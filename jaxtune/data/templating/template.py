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
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune.config import RESERVED, ConfigError, nearest
from jaxtune.data.schema import SYSTEM_ROLES, Conversation, Message
from jaxtune.data.templating import builtin_templates, format_string, jinja, probes, thinking
from jaxtune.data.templating.builtin_templates import BUILTIN, TemplateStrings
from jaxtune.data.templating.format_string import Placeholders
from jaxtune.data.templating.literal_special_tokens import strings as strings_in
from jaxtune.data.templating.probes import ANSWER, QUESTION, TOOLS, Ends
from jaxtune.data.templating.rendered_checks import squeeze
from jaxtune.data.templating.tool_calls import CallForm
from jaxtune.data.tokenizer import Tokenizer

# What `strftime_now` tells: the date Llama 3.1's template falls back to. Only that it never moves
# matters; a template that asks for today would otherwise make other tokens every day.
DATE = datetime.date(2024, 7, 26)
_MOST_VARIANTS = 256  # of a template, by the arguments that rows bring


# Roles that few templates know -> what they are to the others.
FALLBACK_ROLES = {
    "developer": "system",
    **dict.fromkeys(("function", "ipython", "tool_response"), "tool"),
}


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
    stop: str  # the token that ends a plain answer
    ours: bool  # written here: trusted, and brings the system prompt itself
    system_prompt: str
    opening: str  # before a `Document`: bos where the tokenizer puts one before plain text
    closing: str  # after a `Document`: eos
    named: Mapping[str, str]  # bos_token, eos_token, ... as the template's variables
    special_tokens: Mapping[str, int]
    special_pattern: re.Pattern[str]  # the special tokens that steer where the template writes one
    request: TemplateRequest
    date: datetime.date = DATE
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # chat_template_kwargs
    with_tools: Template | None = None  # in place of this one for conversations with tools
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)  # to export, by name
    content_parts: bool = False  # it reads content only as parts, as models that see images have it

    def for_conversation(self, conversation: Conversation) -> Template:
        """Return the template as this conversation has it: by its tools, with its own arguments.

        Raises `jinja.TemplateFailed` where an argument would write a special token.
        """
        chosen, kwargs = self, conversation.template_kwargs
        if self.with_tools is not None and conversation.tools:
            chosen = self.with_tools
        if not kwargs:
            return chosen
        if found := self.special_pattern.search("\0".join(strings_in(kwargs))):
            raise SpecialTokenInKwargs(f"{found[0]!r}; it would steer the model. Take it out")
        key = json.dumps(kwargs, sort_keys=True)
        if key not in chosen._variants:
            if len(chosen._variants) == _MOST_VARIANTS:
                chosen._variants.clear()
            chosen._variants[key] = dataclasses.replace(chosen, kwargs={**self.kwargs, **kwargs})
        return chosen._variants[key]

    @functools.cached_property
    def _variants(self) -> dict[str, Template]:
        """Hold the template with arguments of rows: what probes learn is learned once for each."""
        return {}

    def unread(self, kwargs: Iterable[Mapping[str, Any]]) -> Counter[str]:
        """Count the arguments that the template never reads, by name."""
        sources = [self.jinja, *([self.with_tools.jinja] if self.with_tools else [])]
        read = frozenset().union(*map(jinja.arguments, sources))
        return Counter(name for each in kwargs for name in each if name not in read)

    def unread_text(self, unread: Mapping[str, int], of: str = "") -> str:
        """Say which arguments are not read, and those that could be; `of` is what they count."""
        known = sorted(jinja.options(self.jinja) - RESERVED - self.named.keys())
        names = [
            f"{name} ({count:,} {of}{'s' * (count > 1)})" if of else name
            for name, count in unread.items()
        ]
        reads = f"it reads {', '.join(known)}" if known else "it reads none"
        return (
            f"chat_template_kwargs: template '{self.name}' never reads {', '.join(names)}; {reads}."
            f"{nearest(next(iter(unread)), known)}"
        )

    @property
    def exported(self) -> Mapping[str, str]:
        """Return the chat templates that an export writes, by name: with the run's arguments as
        defaults, and the system prompt that `text` puts before the messages.
        """
        sources = self.sources or {"default": self.jinja}
        return {name: self._exported(source) for name, source in sources.items()}

    def _exported(self, source: str) -> str:
        before = "".join(
            f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}"
            for name, value in self.kwargs.items()
            if name in jinja.arguments(source)
        )
        if self.system_prompt and not self.ours:
            prompt = _literal({"role": "system", "content": self.system_prompt})
            before += (  # a test, as a comparison would say that the template reads the role
                f"{{% if not messages or messages[0]['role'] is not in {list(SYSTEM_ROLES)} %}}"
                "{% set messages = [" + prompt + "] + (messages | list) %}{% endif %}"
            )
        # The line end goes with the tag before it, as everywhere with chat templates.
        return f"{before}\n{source}" if before else source

    @property
    def stop_id(self) -> int:
        return self.special_tokens.get(self.stop, -1)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Return the tokens at which generation stops: of all kinds of turns that were trained."""
        own = tuple(self.special_tokens[token] for token in self.ends.stops)
        return own if self.with_tools is None else (*own, *self.with_tools.stop_ids)

    @functools.cached_property
    def ends(self) -> Ends:
        if self.ours:
            return Ends((self.stop,), self.stop)
        return probes.ends(self.text, self.special_pattern, self.request.stop)

    @functools.cached_property
    def call_form(self) -> CallForm:
        return probes.call_form(self.text)

    @functools.cached_property
    def reads_tools(self) -> bool:
        return probes.reads_tools(self.text)

    @functools.cached_property
    def prompt_only(self) -> str:
        """Return what a plain answer lacks of the generation prompt, such as "<think>\\n"."""
        return probes.prompt_only(self.text)

    @functools.cached_property
    def steers_thinking(self) -> bool:
        return not self.ours and probes.steers_thinking(self.text)

    @property
    def fingerprint(self) -> str:
        parts = [self.jinja, self.stop, self.system_prompt, self.opening, self.closing]
        parts += [str(self.ours), str(self.date), str(sorted(self.named.items()))]
        parts += [json.dumps(self.kwargs)] if self.kwargs else []
        parts += [self.with_tools.fingerprint] if self.with_tools else []
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    @functools.cached_property
    def reads_input(self) -> bool:
        """Tell whether it places a message's `input` itself, as ours do, exported ones too."""
        return re.search(r"""message(\.input\b|\[['"]input['"]\])""", self.jinja) is not None

    @functools.cached_property
    def _reads_thinking_parts(self) -> bool:
        """Tell whether thinking reaches it as a part of the content alone, as with Mistral's."""
        return (
            "thinking" in jinja.compared(self.jinja, "type")
            and "reasoning_content" not in self.jinja
        )

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
        brings_none = not messages or messages[0].role not in SYSTEM_ROLES
        if not self.ours and self.system_prompt and brings_none:
            plain.append({"role": "system", "content": self.system_prompt})
        for message in messages:
            content, own_input = message.content, message.input
            if own_input and not self.reads_input:
                content, own_input = "\n".join(filter(None, (content, own_input))), ""
            beside = {"input": own_input} if own_input else {}
            role = message.role
            if role in FALLBACK_ROLES and role not in jinja.compared(self.jinja, "role"):
                role = FALLBACK_ROLES[role]
            extra = thinking.aliased(message.extra) if message.extra else {}
            plain.append({"role": role, "content": content, **beside, **extra})
            if extra.get("reasoning_content") and self._reads_thinking_parts:
                thought = {"type": "thinking", "thinking": extra["reasoning_content"]}
                plain[-1]["content"] = [thought, {"type": "text", "text": content}]
            elif self.content_parts:
                plain[-1]["content"] = [{"type": "text", "text": content}]
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


def _literal(value: Any) -> str:
    """Write a JSON value in jinja."""
    if isinstance(value, Mapping):
        items = (f"{_literal(key)}: {_literal(inner)}" for key, inner in value.items())
        return "{" + ", ".join(items) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


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
        template = "chat" if tokenizer.chat_templates else "alpaca"
    if no_input is not None and (template in BUILTIN or "{input}" not in template):
        raise ConfigError("template_no_input: the template is no string with {input}. Unset it.")
    bos = (tokenizer.bos_token or "") if tokenizer.begins_with_bos else ""
    strings = TemplateStrings(bos, stop or "", system_prompt or "")
    foreign = False
    if template in BUILTIN:
        source = _builtin(template, strings, tokenizer)
    elif template == "chat" or template.startswith("chat:"):
        source, foreign = _tokenizers_own(template, tokenizer), True
    elif _is_jinja(template):
        source, foreign = _from_file(template), True
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
        ours=not foreign,
        system_prompt=strings.system,
        opening=bos,
        closing=tokenizer.eos_token or source.stop,
        named=tokenizer.named,
        special_tokens=tokenizer.special_tokens,
        special_pattern=tokenizer.special_pattern,
        request=request,
        date=date,
        kwargs=kwargs or {},
        sources=source.exported,
    )
    if template == "chat" and "tool_use" in tokenizer.chat_templates:
        return _by_tools(resolved, tokenizer, stop)
    return _probed(resolved, tokenizer, stop) if foreign else resolved


class _Source(NamedTuple):
    """A template's jinja before what it does is known; `stop` is empty where a probe will tell."""

    name: str
    jinja: str
    stop: str
    exported: Mapping[str, str] = {}


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


def _tokenizers_own(template: str, tokenizer: Tokenizer) -> _Source:
    """Choose among the tokenizer's chat templates: `chat` as transformers does, `chat:NAME`."""
    templates = tokenizer.chat_templates
    if not templates:
        raise ConfigError(
            f"template '{template}': the tokenizer in {tokenizer.folder} has no chat template. "
            f"Choose one of: {', '.join(BUILTIN)}."
        )
    name = template.partition(":")[2]
    if template == "chat" and not templates.keys() & {"default", "tool_use"}:
        raise ConfigError(
            "template 'chat': the tokenizer has several chat templates and none is the default. "
            f"Set template to one of: {_by_name(templates)}."
        )
    if template != "chat" and name not in templates:
        raise ConfigError(
            f"template '{template}': the tokenizer has no chat template of that name."
            f"{nearest(name, [*templates])} It has: {_by_name(templates)}."
        )
    if template == "chat":
        # As in transformers, where it is an error too.
        absent = (
            "the tokenizer has no default chat template, only one for conversations with tools. "
            f"Set template to one of: {_by_name(templates)}"
        )
        refusing = "{{ raise_exception(" + _literal(absent) + ") }}"
        return _Source("chat", templates.get("default", refusing), "", templates)
    # What is trained becomes the default; with tools `tool_use` would be taken before it.
    others = {n: text for n, text in templates.items() if n not in ("default", "tool_use")}
    return _Source(template, templates[name], "", {"default": templates[name], **others})


def _by_name(templates: Iterable[str]) -> str:
    return ", ".join(f"chat:{name}" for name in templates)


def _by_tools(template: Template, tokenizer: Tokenizer, stop: str | None) -> Template:
    """Learn of the tokenizer's own template and of its `tool_use` how they end an answer."""
    source = tokenizer.chat_templates["tool_use"]
    tool_use = dataclasses.replace(template, name="chat:tool_use", jinja=source, sources={})
    if "default" not in tokenizer.chat_templates:
        tool_use = _probed(tool_use, tokenizer, stop, tools=TOOLS)
        return dataclasses.replace(template, stop=tool_use.stop, with_tools=tool_use)
    template = _probed(template, tokenizer, stop)
    try:
        tool_use = _probed(tool_use, tokenizer, stop, tools=TOOLS)
    except ConfigError as error:  # conversations without tools do not need it
        refusing = "{{ raise_exception(" + _literal(str(error)) + ") }}"
        tool_use = dataclasses.replace(template, name=tool_use.name, jinja=refusing)
    return dataclasses.replace(template, with_tools=tool_use)


def _from_file(template: str) -> _Source:
    """Read a template that is not ours."""
    if not template.endswith(".jinja"):
        return _Source("custom", template, "")
    try:
        source = Path(template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"template: {template}: cannot be read: {error}.") from None
    return _Source(Path(template).name, source, "")


def _probed(
    template: Template, tokenizer: Tokenizer, stop: str | None, *, tools: Any = None
) -> Template:
    """Learn how a foreign template takes content and ends an answer, by rendering one."""
    text, failure = _question_and_answer(template, tools)
    # The failure that is told is that of plain content without tools.
    for content_parts, with_tools in ((True, tools), (False, TOOLS)):
        if text is None:
            template = dataclasses.replace(template, content_parts=content_parts)
            text, _ = _question_and_answer(template, tools := with_tools)
    if text is None:
        raise ConfigError(f"template '{template.name}' {failure}")
    behind = text.rpartition(ANSWER.content)[2]
    _refuse_system_prompt(template, tools)
    if not template.ends.stops:
        raise ConfigError(
            f"template '{template.name}' puts {behind.lstrip()[:20]!r} after an answer; expected "
            f"{repr(stop) if stop else 'a special token of the tokenizer'}, so that the model "
            "learns to stop. Set stop to what the template writes there, or choose another."
        )
    return dataclasses.replace(template, stop=_stop_token(template.ends.stops[0], tokenizer))


def _question_and_answer(template: Template, tools: Any) -> tuple[str | None, str]:
    """Render a question and its answer; None, and why, if the template does not show them."""
    try:
        text = dataclasses.replace(template, system_prompt="").text((QUESTION, ANSWER), tools)
    except jinja.TemplateFailed as error:
        return None, f"cannot be rendered: {error}"
    if QUESTION.content not in text.rpartition(ANSWER.content)[0]:
        return None, f"does not show a question and its answer; it renders them as {text[:80]!r}."
    return text, ""


def _refuse_system_prompt(template: Template, tools: Any) -> None:
    """Raise `ConfigError` if the template does not show the system prompt."""
    if not template.system_prompt:
        return
    try:
        shown = template.text((QUESTION,), tools, prompt=True)
    except jinja.TemplateFailed as error:
        raise ConfigError(
            f"system_prompt: template '{template.name}' refuses it: {error}"
        ) from None
    if squeeze(template.system_prompt) not in squeeze(shown):
        raise ConfigError(f"system_prompt: template '{template.name}' does not show it. Unset.")
