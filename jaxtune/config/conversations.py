"""The words of a config for conversations: roles of messages, arguments of chat templates.

Arguments (`chat_template_kwargs`) reach a template as `apply_chat_template(**kwargs)` does it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# The names that data has for roles -> the role. Those that chat templates seldom know are passed on
# where a template reads them, else mapped to one of the first four (`templating.template`).
ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation"), "tool"),
    **{role: role for role in ("developer", "function", "ipython", "tool_response")},
    **dict.fromkeys(("tool_call", "function_call"), "tool_call"),  # the assistant's, as text
}

# Tokens that a tokenizer's config names, and chat templates know by these names.
TOKEN_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
# Set from the conversation, the tokenizer or the call itself; `documents` may be given.
RESERVED = frozenset(
    {
        *("messages", "tools", "add_generation_prompt", "continue_final_message", "conversation"),
        *("chat_template", "tokenize", "padding", "truncation", "max_length", "return_tensors"),
        *("return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
        *("sanitize_control_tokens", "raise_exception", "strftime_now"),
        *TOKEN_NAMES,
    }
)


def kwargs_mistake(kwargs: Mapping[Any, Any]) -> str | None:
    """Describe why `kwargs` cannot be handed to a chat template; None if they can."""
    for name, value in kwargs.items():
        if not isinstance(name, str) or not name.isidentifier():
            return f"{name!r} is no name of a variable"
        if name in RESERVED:
            return f"{name} is set by jaxtune itself; leave it out"
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            kind = type(value).__name__
            return f"{name} is {str(value)[:40]} ({kind}), which JSON cannot hold; quote it as text"
    return None
