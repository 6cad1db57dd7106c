"""Token ids of requests, the same as those of `chat`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtune.config import DataError, JaxtuneError
from jaxtune.data.formats import to_noun
from jaxtune.data.schema import Conversation, Message
from jaxtune.inference.generate import prompt_ids
from jaxtune.inference.load import GenerationModel, TextCodec
from jaxtune.training.initial_weights import check_ids


def chat_ids(
    model: GenerationModel,
    codec: TextCodec,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
) -> list[int]:
    """Tokenize messages as OpenAI has them.

    Raises: DataError and ConfigError for what the model's template cannot show: an answer at the
    end, tools or tool calls that it does not read, a role it lacks.
    """
    fields = {"messages": list(messages), **({"tools": list(tools)} if tools else {})}
    noun = to_noun("messages", fields, {}, "messages")
    if not isinstance(noun, Conversation):
        raise DataError(f"{': '.join(filter(None, noun))}.")
    if noun.messages[-1].role not in ("user", "tool"):
        raise DataError("the last one is no question. End with a message of the user or a tool.")
    ids = prompt_ids(model, codec, noun)
    if noun.tools and ids == prompt_ids(model, codec, noun._replace(tools=None)):
        raise DataError("the template of this model reads no tools. Leave tools out.")
    if any("tool_calls" in m.extra for m in noun.messages):
        without = noun._replace(messages=tuple(map(_without_calls, noun.messages)))
        try:
            unread = ids == prompt_ids(model, codec, without)
        except JaxtuneError:  # it refuses an answer that says nothing and calls nothing
            unread = False
        if unread:
            raise DataError(
                "the template of this model shows no tool calls. Say in content what was called."
            )
    return ids


def _without_calls(message: Message) -> Message:
    extra = {name: value for name, value in message.extra.items() if name != "tool_calls"}
    return message._replace(extra=extra)


def text_ids(model: GenerationModel, codec: TextCodec, text: str) -> list[int]:
    """Tokenize a text as it stands: special tokens in it are meant, and bos comes first if the
    tokenizer puts it before plain text."""
    tokenizer = codec.tokenizer
    bos = tokenizer.bos_id if tokenizer.begins_with_bos else None
    ids = [*([] if bos is None else [bos]), *tokenizer.encode(text)]
    check_ids(max(ids, default=0), model.name, model.spec, tokenizer)
    return ids
