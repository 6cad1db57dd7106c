"""The tags around a model's thinking, and answers behind a prompt that opens or closes them.

Some generation prompts open the block, and some templates leave it out of the answers they write,
or write it only where there was thinking. Behind an opened block, an answer closes it:

    <think>\\n   thinking "Birds run."   ->   Birds run.\\n</think>\\n\\nThe ostrich.<end>
    <think>\\n   no thinking             ->   \\n</think>\\n\\nThe ostrich.<end>

Behind a block that the prompt has closed, an answer without thinking follows as it is, and one with
thinking cannot be shown: inference would never let the model think there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxtune.data.schema import Message
from jaxtune.data.templating.rendered_checks import squeeze

# One field under three names. transformers fills the first two from whichever is there.
FIELDS = ("reasoning_content", "thinking", "reasoning")


class ThinkingTags(NamedTuple):
    """A pair of tags, as models of one maker write them."""

    opening: str
    closing: str


TAGS = (
    ThinkingTags("<think>", "</think>"),  # DeepSeek, Qwen, GLM, Nemotron, MiniMax
    ThinkingTags("<thinking>", "</thinking>"),
    ThinkingTags("<seed:think>", "</seed:think>"),  # ByteDance Seed
    ThinkingTags("[THINK]", "[/THINK]"),  # Mistral
    ThinkingTags("<|START_THINKING|>", "<|END_THINKING|>"),  # Cohere
    ThinkingTags("<|channel>thought", "<channel|>"),  # Gemma 4
    ThinkingTags("<unused94>thought", "<unused95>"),  # MedGemma
    ThinkingTags("<|begin_of_thought|>", "<|end_of_thought|>"),
    ThinkingTags("◁think▷", "◁/think▷"),  # Kimi
)


def aliased(extra: Mapping[str, Any]) -> Mapping[str, Any]:
    """Fill in the names of the thinking that transformers (5.24) fills in for chat templates."""
    thinking = next((extra[name] for name in FIELDS if extra.get(name) is not None), None)
    if thinking is None:
        return extra
    return {"thinking": thinking, **extra, "reasoning_content": thinking}


def opened(prompt: str) -> ThinkingTags | None:
    """Return the block that `prompt` ends in, with nothing but blanks behind its opening."""
    text = prompt.rstrip()
    return next((tags for tags in TAGS if text.endswith(tags.opening)), None)


def closed(prompt: str) -> bool:
    """Tell whether `prompt` ends with the end of a block."""
    return prompt.rstrip().endswith(tuple(tags.closing for tags in TAGS))


def field(message: Message) -> str:
    """Return the thinking that a message has in a field; "" if it has none."""
    value = aliased(message.extra).get("reasoning_content") if message.extra else None
    return value.strip() if isinstance(value, str) else ""


def thought(message: Message) -> str:
    """Return the thinking of a message: of its field, else of its content; "" if it has none."""
    if known := field(message):
        return known
    for tags in TAGS:
        before, closing, _ = message.content.partition(tags.closing)
        if closing:
            return before.rpartition(tags.opening)[2].strip()
    return ""


def completed(prompt: str, tags: ThinkingTags, message: Message, own: str) -> tuple[str, str]:
    """Complete the text `own` that a template writes for a message to follow an opened block.

    Returns (what comes before it, `own`): nothing if `own` itself closes the block.
    """
    before, closing, _ = own.partition(tags.closing)
    hidden = thought(message)
    if closing:
        written = before.strip() or squeeze(hidden) in squeeze(own)
        return ("" if written else hidden), own
    if prompt.endswith("\n"):
        return f"{hidden}\n{tags.closing}\n\n", own.lstrip()
    return f"{hidden}{tags.closing}", own
