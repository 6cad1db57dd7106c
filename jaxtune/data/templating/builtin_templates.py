"""The built-in templates: files of jinja in `builtin/`, one a name.

Every file becomes a chat template that transformers renders to the same text, so what was trained
can be exported as it stands. A template says where text goes; what of it is trained is derived in
`masking`. To add one: a file, and a line in `BUILTIN`.

The files are jinja in which `[[ bos ]]`, `[[ stop ]]` and `[[ system ]]` stand for the strings of
the tokenizer and the configuration, and lines that begin with `%%` choose by them; `[# ... #]` is a
comment that is not exported.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import jinja2


class Code(str):
    """A piece of jinja, written as it stands; other text is escaped for a quoted string."""

    __slots__ = ()


class TemplateStrings(NamedTuple):
    """A template's strings that come from the tokenizer and the configuration."""

    bos: str  # "" where the tokenizer puts none before plain text
    stop: str  # end of turn after an answer
    system: str  # for conversations that bring none; "" = none


class Builtin(NamedTuple):
    """A built-in template. `stop` None = the tokenizer's eos. `needs`: special tokens in its text.

    Where the tokenizer lacks one of them, `add_tokens` can bring it.
    """

    stop: str | None = None
    needs: tuple[str, ...] = ()


_CHATML = ("<|im_start|>", "<|im_end|>")
_LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
BUILTIN: dict[str, Builtin] = {
    "alpaca": Builtin(),
    "alpaca_original": Builtin(),
    "dolly": Builtin(stop="### End"),
    "chatml": Builtin(stop="<|im_end|>", needs=_CHATML),
    "gemma": Builtin(stop="<end_of_turn>", needs=("<start_of_turn>", "<end_of_turn>")),
    "llama2": Builtin(),
    "llama3": Builtin(stop="<|eot_id|>", needs=_LLAMA3),
    "mistral": Builtin(),
    "phi3": Builtin("<|end|>", needs=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
    "plain": Builtin(),
    "qwen": Builtin(stop="<|im_end|>", needs=_CHATML),
    "vicuna": Builtin(),
    "zephyr": Builtin(),
}


def source(name: str, strings: TemplateStrings, **values: str | bool) -> str:
    """Read `builtin/NAME.jinja` and put the strings, and `values` if it has more, in place.

    >>> strings = TemplateStrings(bos="<s>", stop="</s>", system="")
    >>> source("plain", strings).splitlines()[0]
    '{{- "<s>" -}}'
    """
    return _FILES.get_template(f"{name}.jinja").render(strings._asdict(), **values)


def quoted(text: str) -> str:
    """Return `text` as a string of jinja, whatever is in it."""
    return json.dumps(text, ensure_ascii=False)


def _written(value: str) -> str:
    return value if isinstance(value, Code) else quoted(value)[1:-1]


# Other brackets than those of chat templates, which are only text here.
_FILES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "builtin"),
    block_start_string="[%",
    block_end_string="%]",
    variable_start_string="[[",
    variable_end_string="]]",
    comment_start_string="[#",
    comment_end_string="#]",
    line_statement_prefix="%%",
    trim_blocks=True,
    undefined=jinja2.StrictUndefined,
    finalize=_written,
)
