"""The tests that the second Python runs: each kernel, family, optimizer and command once.

An entry is a node id below tests/: one case, a function with all its cases, or a whole file.
"""

from __future__ import annotations

import pytest

COLLECTED = pytest.StashKey[frozenset[str]]()  # node ids below tests/, before any are left out
# model_type -> its case in golden/cases.py
FAMILIES = {
    "llama": "llama", "mistral": "mistral-window", "qwen2": "qwen2-tied", "qwen3": "qwen3",
    "gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3", "phi3": "phi3-longrope",
    "olmo2": "olmo2", "olmo3": "olmo3", "granite": "granite", "smollm3": "smollm3",
    "starcoder2": "starcoder2", "ministral3": "ministral3", "seed_oss": "seed-oss", "glm": "glm",
    "glm4": "glm4", "exaone4": "exaone4", "mixtral": "mixtral", "qwen2_moe": "qwen2-moe",
    "qwen3_moe": "qwen3-moe", "olmoe": "olmoe", "gpt_oss": "gpt-oss",
}  # fmt: skip
KERNELS = {
    "reference": "ops/test_attention.py::test_gradients_are_those_of_the_reference[reference-all]",
    "blocked": "ops/test_attention.py::test_gradients_are_those_of_the_reference[blocked-all]",
    "splash": "ops/test_kernels.py::test_values_and_gradients_are_those_of_the_reference[all]",
    "cudnn": "ops/test_kernels.py::test_the_call_of_cudnn_is_the_reference",
}
OPTIMIZERS = {
    name: f"training/test_optim.py::test_six_steps_equal_those_of_the_library_people_use[{name}]"
    for name in ("adamw", "adafactor", "lion", "sgd", "muon", "schedule_free")
}
COMMANDS = {
    "train": "commands/test_train.py::test_a_run_leaves_what_the_contract_says",
    "preview": "commands/test_preview.py::test_text_marks_what_is_trained_then_reports",
    "plan": "commands/test_plan.py::test_one_object_with_the_keys_of_the_contract",
    "evaluate": "commands/test_evaluate.py::test_answers",
    "chat": "commands/test_chat.py::test_one_prompt",
    "report": "commands/test_report.py::test_numbers_of_the_page_are_those_of_the_run",
    "convert": "commands/test_convert.py::test_the_newest_checkpoint",
}
MORE = (
    # What depends on the versions of Python, pydantic, numpy and the tokenizers rather than on XLA.
    "test_floors.py", "test_tree.py", "test_spec.py", "config/test_config.py",
    "data/test_formats.py", "data/test_pipeline.py", "data/test_workers.py",
    "data/test_tokenizer.py", "data/test_sentencepiece.py", "hf/test_families.py",
    "hf/test_tensors.py", "server/test_app.py", "storage/test_lock.py", "terminal/test_text.py",
    "training/test_checkpoints.py", "training/test_metrics.py", "training/test_schedules.py",
    "storage/test_object_store.py::test_half_an_object_is_never_taken_for_whole",
    # The other kernels.
    "ops/test_cross_entropy.py::test_equals_the_definition[chunks-4-2-0.1-nll-True]",
    "ops/test_cross_entropy.py::test_equals_the_definition[chunks-4-2-0.1-dft-True]",
    "ops/test_cross_entropy.py::test_gradients_are_the_slopes[5-1.5]",
    "ops/test_decode.py", "ops/test_neftune.py", "ops/test_rope.py",
    "ops/test_moe.py::test_mixture_is_that_of_the_loops[3-True-clamp1-apply_experts]",
    "ops/test_moe.py::test_gradients_of_ragged_are_those_of_the_reference",
    # Learning rate 0, microbatches, devices, packing; a resumed run; adapters; decoding; hosts.
    "training/test_step.py::test_learning_rate_zero_leaves_every_byte",
    "training/test_step.py::test_microbatches_equal_one_batch[8]",
    "training/test_step.py::test_eight_devices_equal_one[sizes4-2]",
    "training/test_step.py::test_packed_equals_unpacked",
    "training/test_meshes.py::test_loss_and_gradients_are_those_of_one_device[gpt-oss-6-reference]",
    "commands/test_train.py::test_killed_and_resumed_is_the_uninterrupted_run[6-True-5]",
    "commands/test_adapters.py::test_a_run_trains_adapters_alone_and_writes_both_folders",
    "commands/test_serve.py::test_the_openai_client_gets_what_chat_answers",
    "model/test_lora.py", "model/test_quantise.py",
    "inference/test_decode_step.py::test_a_batch_of_unequal_prompts_is_the_plain_way",
    "inference/test_engine.py::test_refilled_slots_answer_as_if_alone",
    "hf/test_parity.py::test_greedy_generation_is_that_of_transformers[llama]",
    "hf/test_parity.py::test_greedy_generation_is_that_of_transformers[gemma3]",
    "hf/test_parity.py::test_greedy_generation_is_that_of_transformers[gpt-oss]",
    "multihost/test_many_hosts.py::test_two_hosts_are_one_run",
)  # fmt: skip

NODES = frozenset((
    *(f"hf/test_parity.py::test_against_stored_values[{name}]" for name in FAMILIES.values()),
    *KERNELS.values(), *OPTIMIZERS.values(), *COMMANDS.values(), *MORE,
))  # fmt: skip


def entries_of(node: str) -> set[str]:
    """Returns the entries of the table that hold a test: itself, its function, its file."""
    return {node, node.partition("[")[0], node.partition("::")[0]} & NODES
