"""The prompts of requests as tokens, the same as those of `chat`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxtune.config import DataError, JaxtuneError
from jaxtune.data.formats import to_conversation
from jaxtune.data.schema import Conversation, Dropped, Message
from jaxtune.data.templating.template import Template
from jaxtune.inference.generate import prompt_ids
from jaxtune.inference.load import GenerationModel, TextCodec
from jaxtune.training.initial_weights import check_ids


class PromptTokens(NamedTuple):
    """A prompt, and the template by which it is a conversation's; None for plain text."""

    ids: list[int]
    template: Template | None = None


def chat_prompt(
    model: GenerationModel,
    codec: TextCodec,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    template_kwargs: Mapping[str, Any],
) -> PromptTokens:
    """Tokenize messages as OpenAI has them; `template_kwargs` are the request's own.

    Raises: DataError and ConfigError for what the model's template cannot show: an answer at the
    end, tools or tool calls that it does not read, a role it lacks.
    """
    fields = {"messages": list(messages), "tools": list(tools)}
    noun = to_conversation(fields, "messages")
    if isinstance(noun, Dropped):
        raise DataError(f"{noun.text}.")
    if noun.messages[-1].role not in ("user", "tool"):
        raise DataError("the last one is no question. End with a message of the user or a tool.")
    noun = noun._replace(template_kwargs=template_kwargs)
    ids = prompt_ids(model, codec, noun)

    def changes_nothing(other: Conversation) -> bool:
        try:
            return ids == prompt_ids(model, codec, other)
        except JaxtuneError:  # such as an answer that says nothing and calls nothing
            return False

    if noun.tools and changes_nothing(noun._replace(tools=None)):
        raise DataError("the template of this model reads no tools. Leave tools out.")
    without_calls = noun._replace(messages=tuple(map(_without_calls, noun.messages)))
    if without_calls != noun and changes_nothing(without_calls):
        raise DataError(
            "the template of this model shows no tool calls. Say in content what was called."
        )
    return PromptTokens(ids, codec.template.for_conversation(noun))


def _without_calls(message: Message) -> Message:
    extra = {name: value for name, value in message.extra.items() if name != "tool_calls"}
    return message._replace(extra=extra)


def completion_prompt(model: GenerationModel, codec: TextCodec, text: str) -> PromptTokens:
    """Tokenize a text as it stands: special tokens in it are meant, and bos comes first if the
    tokenizer puts it before plain text."""
    tokenizer = codec.tokenizer
    bos = tokenizer.bos_id if tokenizer.begins_with_bos else None
    ids = [*([] if bos is None else [bos]), *tokenizer.encode(text)]
    check_ids(max(ids, default=0), model.name, model.spec, tokenizer)
    return PromptTokens(ids)
