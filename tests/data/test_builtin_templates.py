"""The named templates against what their makers publish, and the two ways to say no input."""

from __future__ import annotations

import pytest
from data.conversations import ONE, TWO, only, rows, text, trained
from data.made import NAMES, byte_level_backend, save

from jaxtune.config import ConfigError
from jaxtune.data.schema import Conversation, Dropped, Message
from jaxtune.data.templating.builtin_templates import BUILTIN
from jaxtune.data.templating.masking import render, render_prompt
from jaxtune.data.templating.template import needed_tokens, resolve
from jaxtune.data.tokenizer import Tokenizer

SYSTEM = Message("system", "Be brief.")
DOLLY = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n"
)
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. "
)
QWEN = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."

# One turn, two turns with a system message; `|` stands around what is trained. From the makers'
# own code and model cards: databricks dolly (training/consts.py), mistral-common v3, the chat
# templates of gemma-3, Phi-3.5-mini, Qwen2.5, zephyr-7b-beta, and FastChat's vicuna_v1.1.
PUBLIC = {
    "dolly": (
        DOLLY + "### Instruction:\nName a prime.\n\n### Response:\n|Seven.\n\n### End|",
        "Be brief.\n\n### Instruction:\nName a prime.\n\n### Response:\n|Seven.\n\n### End|\n\n"
        "### Instruction:\nAnother?\n\n### Response:\n|Eleven.\n\n### End|",
    ),
    "mistral": (
        "[INST] Name a prime.[/INST]| Seven.</s>|",
        "[INST] Be brief.\n\nName a prime.[/INST]| Seven.</s>|[INST] Another?[/INST]| Eleven.</s>|",
    ),
    "gemma": (
        "<start_of_turn>user\nName a prime.<end_of_turn>\n<start_of_turn>model\n"
        "|Seven.<end_of_turn>|\n",
        "<start_of_turn>user\nBe brief.\n\nName a prime.<end_of_turn>\n<start_of_turn>model\n"
        "|Seven.<end_of_turn>|\n<start_of_turn>user\nAnother?<end_of_turn>\n<start_of_turn>model\n"
        "|Eleven.<end_of_turn>|\n",
    ),
    "phi3": (
        "<|user|>\nName a prime.<|end|>\n<|assistant|>\n|Seven.<|end|>|\n",
        "<|system|>\nBe brief.<|end|>\n<|user|>\nName a prime.<|end|>\n<|assistant|>\n"
        "|Seven.<|end|>|\n<|user|>\nAnother?<|end|>\n<|assistant|>\n|Eleven.<|end|>|\n",
    ),
    "qwen": (
        QWEN + "<|im_end|>\n<|im_start|>user\nName a prime.<|im_end|>\n"
        "<|im_start|>assistant\n|Seven.<|im_end|>|\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nName a prime.<|im_end|>\n"
        "<|im_start|>assistant\n|Seven.<|im_end|>|\n<|im_start|>user\nAnother?<|im_end|>\n"
        "<|im_start|>assistant\n|Eleven.<|im_end|>|\n",
    ),
    "zephyr": (
        "<|user|>\nName a prime.</s>\n<|assistant|>\n|Seven.</s>|\n",
        "<|system|>\nBe brief.</s>\n<|user|>\nName a prime.</s>\n<|assistant|>\n|Seven.</s>|\n"
        "<|user|>\nAnother?</s>\n<|assistant|>\n|Eleven.</s>|\n",
    ),
    "vicuna": (
        VICUNA + "USER: Name a prime. ASSISTANT:| Seven.</s>|",
        "Be brief. USER: Name a prime. ASSISTANT:| Seven.</s>|USER: Another? ASSISTANT:"
        "| Eleven.</s>|",
    ),
    "plain": (
        "Name a prime.|Seven.</s>|",
        "Be brief.\n\nName a prime.|Seven.</s>|Another?|Eleven.</s>|",
    ),
}


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Has the special tokens of every named template."""
    backend = byte_level_backend()
    backend.add_special_tokens([token for name in BUILTIN for token in needed_tokens(name)])
    return save(tmp_path_factory.mktemp("rich"), backend, **NAMES)


def bars(row: tuple) -> str:
    """The row's text with a bar before and behind every trained span."""
    return "".join(f"\0{s.text}\0" if s.weight else s.text for s in row)


@pytest.mark.parametrize("name", PUBLIC)
def test_text_is_what_the_makers_publish(rich: Tokenizer, name: str) -> None:
    found = resolve(name, rich)
    for messages, expected in zip((ONE, [SYSTEM, *TWO]), PUBLIC[name], strict=True):
        row = only(found, messages)
        for token in rich.special_tokens:  # some hold a bar
            expected = expected.replace(token, token.replace("|", "\1"))
        assert bars(row) == expected.replace("|", "\0").replace("\1", "|")
        for i, message in enumerate(messages):
            if message.role == "assistant":
                fed = text(render_prompt(found, messages[:i]))
                assert text(row).startswith(fed)


@pytest.mark.parametrize("name", PUBLIC)
def test_input_follows_the_question(rich: Tokenizer, name: str) -> None:
    row = only(resolve(name, rich), [ONE[0]._replace(input="Below ten."), ONE[1]])
    between = "\n\nInput:\n" if name == "dolly" else "\n"
    assert f"Name a prime.{between}Below ten." in text(row)


def test_dolly_may_end_with_another_token(rich: Tokenizer, byte_level: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"lacks: ### End\. Set add_tokens: true"):
        resolve("dolly", byte_level)
    row = only(resolve("dolly", byte_level, stop="</s>"), ONE)
    assert trained(row) == ["Seven.\n\n</s>"]


TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"zone": "string"}}}
CALLING = (
    Message("user", "Time in Oslo?"),
    Message("assistant", "", extra={"tool_calls": [
        {"type": "function", "function": {"name": "clock", "arguments": {"zone": "Oslo"}}}
    ]}),
    Message("tool", '{"now": "12:00"}'),
    Message("assistant", "Noon."),
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "called", "shown"),
    [
        ("mistral", '[TOOL_CALLS] [{"name": "clock", "arguments": {"zone": "Oslo"}}]</s>',
         '[TOOL_RESULTS] {"content": "{\\"now\\": \\"12:00\\"}"}[/TOOL_RESULTS]'),
        ("qwen",
         '<tool_call>\n{"name": "clock", "arguments": {"zone": "Oslo"}}\n</tool_call><|im_end|>',
         '<|im_start|>user\n<tool_response>\n{"now": "12:00"}\n</tool_response><|im_end|>\n'),
    ],
)  # fmt: skip
def test_tools_are_declared_called_and_answered(
    rich: Tokenizer, name: str, called: str, shown: str
) -> None:
    found = resolve(name, rich)
    produced = render(found, Conversation(CALLING, (TOOL,)))
    assert not any(isinstance(row, Dropped) for row in produced), produced
    answers = [answer for row in produced for answer in trained(row)]
    assert answers[0] == called
    assert answers[1].strip() == "Noon." + found.stop
    assert shown in text(produced[-1])
    assert '"name": "clock", "parameters": {"zone": "string"}' in text(produced[0])


def test_templates_without_tools_drop_what_has_them(rich: Tokenizer) -> None:
    for name in BUILTIN:
        if name in ("mistral", "qwen"):
            continue
        for noun in (Conversation(CALLING), Conversation(tuple(ONE), (TOOL,))):
            for row in render(resolve(name, rich), noun):
                assert isinstance(row, Dropped)


def test_a_template_string_may_say_no_input_otherwise(rich: Tokenizer) -> None:
    found = resolve(
        "With input.\n\nQ: {instruction}\nI: {input}\nA: {output}",
        rich,
        no_input="Without.\n\nQ: {instruction}\nA: {output}",
    )
    assert text(only(found, ONE)) == "Without.\n\nQ: Name a prime.\nA: Seven.</s>"
    given = [ONE[0]._replace(input="Below ten."), ONE[1]]
    assert text(only(found, given)) == (
        "With input.\n\nQ: Name a prime.\nI: Below ten.\nA: Seven.</s>"
    )
    assert text(only(found, [*given, *TWO[2:]])).endswith("Seven.</s>Q: Another?\nA: Eleven.</s>")


@pytest.mark.parametrize(
    ("template", "no_input", "message"),
    [
        ("alpaca", "{instruction}{output}", "the template is no string with {input}"),
        ("{instruction}{output}", "{instruction}{output}", "no string with {input}"),
        ("{instruction}{input}{output}", "{instruction}{input}{output}", "without one"),
        ("{instruction}{input}{output}", "{instruction}{output}\n", "must end the same way"),
        ("{instruction}{input}{output}", "{instruct}{output}", "unknown placeholder"),
    ],
)
def test_no_input_errors(rich: Tokenizer, template: str, no_input: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(template, rich, no_input=no_input)


def test_one_refused_role_is_named(rich: Tokenizer) -> None:
    for name in ("mistral", "gemma", "vicuna", "plain", "dolly"):
        (row,) = rows(resolve(name, rich), [ONE[0], *ONE])
        assert isinstance(row, Dropped)
        assert row.detail.endswith("got user")
