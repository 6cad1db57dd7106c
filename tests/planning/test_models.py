"""Arithmetic against counts in closed form, and what the compiler is asked and answers."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from jaxtune.config import ConfigError, load
from jaxtune.hf.load import open_model
from jaxtune.parallel.chips import larger, parse_slice
from jaxtune.parallel.mesh import SIZES
from jaxtune.planning import advice, memory_model, search, time_model
from jaxtune.planning import compile as compiling
from jaxtune.planning.evaluate_config import (
    PlannedRun,
    StepEstimate,
    by_kind,
    evaluate_config,
    figures,
)
from jaxtune.planning.hardware import make_hardware
from jaxtune.planning.hlo_cost import Cost, Wire, axes_along, group_of

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 512,
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "hidden_act": "silu",
}  # fmt: skip
LAYER = 2 * 128 * 16 * (8 + 4) + 3 * 128 * 256
NORMS = (2 * 4 + 1) * 128
ALL = 2 * 512 * 128 + 4 * LAYER + NORMS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planned")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def planned(model: Path, topology: str = "v5e-8", **fields: Any) -> StepEstimate:
    return _planned(model, topology, tuple(fields.items()))


@functools.cache
def _planned(model: Path, topology: str, given: tuple[tuple[str, Any], ...]) -> StepEstimate:
    fields = dict(given)
    values = {"per_device_train_batch_size": 4, "max_length": 1024, **fields}
    config = load(overrides={"model_name_or_path": str(model), **values})
    subject = PlannedRun(open_model(model, weights=False), config.max_length, 100)
    return evaluate_config(config, subject, make_hardware(parse_slice(topology), compiles=False))


def test_parameters_and_optimiser_are_exact(model: Path) -> None:
    found = planned(model)
    cut = (ALL - NORMS) // 8 + NORMS  # norms lie everywhere
    assert found.held["parameters"] == 4 * cut
    assert found.held["optimiser"] == pytest.approx(8 * cut, abs=16)
    assert found.held["trained"] == 4 * cut
    half = planned(model, param_dtype="bfloat16", optim_state_dtype="bfloat16")
    assert half.held["parameters"] == 2 * cut
    assert half.held["optimiser"] == pytest.approx(6 * cut, abs=16)
    alone = planned(model, topology="h100-1")
    assert alone.held["parameters"] == 4 * ALL


def test_adapters_leave_the_base_in_half_or_a_quarter(model: Path) -> None:
    lora = planned(model, **{"lora.r": 8, "lora.targets": "q_proj"})
    adapter = 4 * 8 * (128 + 8 * 16)
    cut = (ALL - NORMS) // 8 + NORMS
    assert lora.trained == adapter
    assert 2 * cut < lora.held["parameters"] < 2 * cut + 4 * adapter + 1
    nf4 = planned(model, **{"lora.r": 8, "lora.targets": "q_proj", "lora.base": "nf4"})
    kernels = 4 * LAYER // 8
    saved = lora.held["parameters"] - nf4.held["parameters"]
    # 1.5 bytes a weight, less its scales: 4 bytes for 64, some of them on every device.
    assert kernels * (1.5 - 8 * 4 / 64) < saved < kernels * (1.5 - 4 / 64)


def test_moments_in_the_memory_of_the_host_are_not_on_the_device(model: Path) -> None:
    here, there = planned(model), planned(model, optim_offload=True)
    assert there.held["host"] == here.held["optimiser"] > 0
    largest = 4 * 512 * 128 // 8  # mu or nu of a table on one of eight devices, f32
    assert there.held["optimiser"] <= 4 * max(largest, 4 * 4 * 128 * 256 // 8)
    assert there.needed < here.needed
    more = figures(there)["host_bytes"] - figures(here)["host_bytes"]
    assert more == 4 * there.held["host"]  # the moments of a host's four devices


def test_flops_are_those_of_the_products(model: Path) -> None:
    found = planned(model, gradient_checkpointing="none")
    tokens = 4 * 1024
    products, attention = memory_model.all_flops(found.work)
    head = 512 * 128
    assert products == tokens * 6 * (4 * LAYER + head)
    streamed = planned(model, gradient_checkpointing="none", loss_block=256)
    again, _ = memory_model.all_flops(streamed.work)
    assert again == products + tokens * 2 * head
    assert attention == tokens * 4 * 12 * 8 * 16 * (1024 + 1) / 2
    again, more = memory_model.all_flops(planned(model).work)
    # A layer is computed once more but for its last product, whose result nobody needs.
    assert again - products == tokens * 2 * 4 * (LAYER - 128 * 256)
    assert more == attention * 4 / 3
    assert memory_model.model_flops(found.work) == tokens * 6 * (4 * LAYER + head) + attention


def test_a_part_is_planned_as_a_part(model: Path) -> None:
    """Of four layers the last one is trained: the others are computed, and that is all."""
    whole, last = planned(model), planned(model, train_last_layers=1)
    tokens, head = 4 * 1024, 512 * 128
    attention = tokens * 4 * 8 * 16 * (1024 + 1) / 2
    products, scores = memory_model.all_flops(last.work)
    again = LAYER - 128 * 256
    assert products == tokens * (2 * 4 * LAYER + 4 * LAYER + 2 * again + 4 * head)
    assert scores == attention * (3 + 4)
    assert memory_model.model_flops(last.work) == (
        tokens * (2 * 4 * LAYER + 4 * LAYER + 4 * head) + attention * (3 + 3)
    )
    assert last.counted["activations"] * 4 == whole.counted["activations"]
    assert (
        memory_model.microbatch_gradients(last.work)
        == last.work.trained * LAYER / (LAYER + 2 * 128) * 2 / 4
    )
    sent = memory_model.wire(last.work)
    assert sent["fsdp"] == pytest.approx(7 / 8 * 2 * (4 * LAYER + LAYER + head + LAYER))
    head_alone = planned(model, trainable="^head")
    assert head_alone.counted["activations"] == 0
    assert sum(head_alone.counted.values()) < sum(last.counted.values())


def test_weights_travel_twice_and_gradients_once(model: Path) -> None:
    found = planned(model)
    sent = memory_model.wire(found.work)
    assert sent == {"fsdp": 7 / 8 * 2 * (3 * 4 * LAYER + 2 * 512 * 128)}
    streamed = planned(model, loss_block=256)
    again = memory_model.wire(streamed.work)["fsdp"] - sent["fsdp"]
    assert again == 7 / 8 * 2 * 512 * 128
    adapters = memory_model.wire(planned(model, **{"lora.r": 8}).work)
    assert adapters == {"fsdp": 7 / 8 * 2 * (2 * 4 * LAYER + 512 * 128)}
    spread = planned(model, **{"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2})
    assert set(memory_model.wire(spread.work)) == {"data", "fsdp", "tensor"}


def test_more_rows_more_memory_and_kinds_add_up(model: Path) -> None:
    sizes = [sum(planned(model, per_device_train_batch_size=n).counted.values()) for n in (1, 2, 8)]
    assert sizes == sorted(sizes)
    order = [
        planned(model, gradient_checkpointing=name).counted["activations"]
        for name in ("full", "dots", "none")
    ]
    assert order[0] == 4 * 1024 * 2 * 4 * 128
    assert order == sorted(order)
    found = figures(planned(model))
    assert sum(found["hbm_by_kind"].values()) == found["hbm_bytes"]


def test_a_chip_of_two_devices_is_two_devices(model: Path) -> None:
    chip, device = figures(planned(model, "tpu7x-8")), planned(model, "tpu7x-8")
    assert chip["chips"] == 4
    assert device.work.devices == 8
    assert chip["hbm_bytes"] == 2 * device.needed
    assert chip["hbm_limit_bytes"] == pytest.approx(189.48 * 2**30, abs=2)
    assert chip["mfu"] == pytest.approx(
        chip["flops_without_recomputation"] / chip["step_seconds"] / 2307e12
    )


# -- time ----------------------------------------------------------------------------------------


def test_the_terms_of_a_compiled_step(model: Path) -> None:
    slice = parse_slice("v5e-8")
    read = compiling.CompiledStep(
        needed=1, arguments=819 * 10**6, cost=Cost(
            cycles=1.503e9, kernel_flops=197e12 / 4,
            wire={"all-gather": Wire(180e9, 18e9)}, axes={"fsdp": 180e9},
        ),
    )  # fmt: skip
    time = time_model.of_compiled(read, slice, 1)
    assert (time.compute, time.attention, time.exposed) == pytest.approx((1.0, 0.5, 0.1))
    assert (time.network, time.memory) == pytest.approx((1.0, 0.002))
    assert time.step == pytest.approx(1.6)
    # No step is shorter than all it sends, hidden or not.
    longer = read._replace(cost=replace(read.cost, wire={"all-gather": Wire(540e9, 0)}))
    assert time_model.of_compiled(longer, slice, 1).step == pytest.approx(3.0)
    across = read._replace(cost=replace(read.cost, axes={"data": 6.25e9}))
    assert time_model.of_compiled(across, parse_slice("2xv5e-8"), 1).step == pytest.approx(2.6)
    offloaded = time_model.of_compiled(read._replace(host=8 * 10**9), slice, 1)
    assert (offloaded.host, offloaded.step) == pytest.approx((1.0, 2.6))


def test_what_waits_in_the_memory_of_the_host_is_paid_for(model: Path) -> None:
    full, offload = planned(model), planned(model, gradient_checkpointing="offload")
    assert full.time is not None
    assert offload.time is not None
    assert full.time.host == 0
    assert offload.time.host == pytest.approx(2 * 4 * 4 * 1024 * 2 * 128 / 16e9)
    assert offload.time.step > full.time.step


# -- the compiler's answer -----------------------------------------------------------------------


def test_a_program_too_large_is_an_answer() -> None:
    said = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (16.75G) exceeds available HBM (15.75G). HLO module: jit."
    )
    found = compiling.too_large(said)
    assert found is not None
    assert (found.needed, found.limit) == (int(16.75 * 2**30), int(15.75 * 2**30))
    assert not found.fits
    older = compiling.too_large("RESOURCE_EXHAUSTED: ... Used 33.61G of 31.25G hbm. Exceeded ...")
    assert older is not None
    assert older.limit == int(31.25 * 2**30)
    # A kernel's scratch memory is another matter, and a bug.
    assert compiling.too_large("RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom: 20M") is None
    assert compiling.too_large("INTERNAL: (16.75G) exceeds available HBM (15.75G)") is None


def test_the_memory_of_a_program_is_what_the_compiler_allocates() -> None:
    parts = {
        "argument_size_in_bytes": 100, "output_size_in_bytes": 30, "alias_size_in_bytes": 20,
        "temp_size_in_bytes": 70, "generated_code_size_in_bytes": 5,
    }  # fmt: skip
    assert compiling._needed(SimpleNamespace(**parts)) == 100 + 30 - 20 + 70 + 5
    assert compiling._needed(SimpleNamespace(**parts, total_allocation_bytes=140)) == 140


def test_a_compiled_step_is_read_once(model: Path, tmp_path: Path) -> None:
    """On eight CPU devices: the same reading, another compiler."""
    config = load(overrides={
        "model_name_or_path": str(model), "per_device_train_batch_size": 1, "max_length": 64,
        "dtype": "float32",
    })  # fmt: skip
    subject = PlannedRun(open_model(model, weights=False), 64)
    there = make_hardware(parse_slice("v5e-8"), compiles=False)
    there = there._replace(devices=jax.devices()[:8], limit=None)
    told: list[str] = []
    both = [
        evaluate_config(config, subject, there, folder=tmp_path, note=told.append, compiles=True)
        for _ in range(2)
    ]
    assert len(told) == 1, "the second is read from disk"
    assert both[0].read == both[1].read
    read = both[0].read
    assert read is not None
    assert read.arguments >= both[0].held["parameters"] + both[0].held["optimiser"]
    assert set(read.cost.axes) == {"fsdp"}
    assert read.cost.axes["fsdp"] == pytest.approx(read.cost.wire_bytes)
    kinds = by_kind(both[0])
    assert sum(kinds.values()) == read.needed
    next(iter(tmp_path.glob("*.json"))).write_text("{")
    evaluate_config(config, subject, there, folder=tmp_path, note=told.append, compiles=True)
    assert len(told) == 2, "a damaged answer is asked for again"


def test_another_program_compiler_or_flag_is_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = jax.make_mesh((8,), ("fsdp",))
    keys = [compiling.key("a program", "v5e:2x4", mesh), compiling.key("another", "v5e:2x4", mesh)]
    keys.append(compiling.key("a program", "v6e:2x4", mesh))
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_scoped_vmem_limit_kib=98304")
    keys.append(compiling.key("a program", "v5e:2x4", mesh))
    monkeypatch.setattr(compiling, "versions", lambda: {"libtpu": "1.0"})
    keys.append(compiling.key("a program", "v5e:2x4", mesh))
    assert len(set(keys)) == len(keys)
    assert compiling.key("a program", "v5e:2x4", mesh) == keys[-1]


@pytest.mark.parametrize(
    ("written", "group", "along"),
    [
        ("replica_groups={{0,4},{1,5}}, x", (0, 4), ("data",)),
        ("replica_groups=[2,4]<=[8], x", (0, 1, 2, 3), ("fsdp", "tensor")),
        ("replica_groups=[2,4]<=[4,2]T(1,0), x", (0, 2, 4, 6), ("data", "fsdp")),
        ("replica_groups=mesh['data'=2,'fsdp'=2,'tensor'=2] {'fsdp'}", (0, 2), ("fsdp",)),
        ("replica_groups=mesh['a'=8] {'a':(2)2}, x", (0, 2), ("fsdp",)),
        ("source_target_pairs={{0,1},{1,0},{2,3},{3,2}}, x", (0, 1), ("tensor",)),
        ("channel_id=1", tuple(range(8)), ("data", "fsdp", "tensor")),
    ],
)
def test_the_axes_a_collective_runs_along(
    written: str, group: tuple[int, ...], along: tuple[str, ...]
) -> None:
    assert group_of(written, 8) == group
    assert axes_along(group, {"data": 2, "fsdp": 2, "tensor": 2}) == along


# -- what to change ------------------------------------------------------------------------------


def test_the_cheapest_change_that_fits_comes_first(model: Path) -> None:
    found = planned(model, per_device_train_batch_size=8, gradient_checkpointing="none")
    limit = round(0.9 * found.needed)
    small = found._replace(hardware=found.hardware._replace(limit=limit))
    assert not small.fits
    first, *_ = advice.remedies(small)
    assert first.what == "--gradient_checkpointing full"
    assert first.needed <= limit
    state = found.held["parameters"] + found.held["optimiser"]
    tiny = small._replace(hardware=found.hardware._replace(limit=state - 1))
    assert "parameters and optimiser state alone" in advice.reason(tiny)
    assert advice.remedies(tiny)[0].what == "--topology v5e-16"


def test_a_change_the_compiler_refuses_is_not_proposed(model: Path) -> None:
    found = planned(model, per_device_train_batch_size=8)
    small = found._replace(hardware=found.hardware._replace(limit=round(0.9 * found.needed)))
    asked = []

    def compile(config: Any) -> StepEstimate:
        asked.append(config)
        return small if len(asked) == 1 else found._replace(read=compiling.CompiledStep(needed=5))

    first, second, *_ = advice.remedies(small, compile=compile)
    assert (first.verified, first.needed, len(asked)) == ("compiled", 5, 2)
    assert "--per_device_train_batch_size 2 " in first.what
    assert second.verified == "arithmetic"


def test_what_the_compiler_found_corrects_the_arithmetic(model: Path) -> None:
    found = planned(model)
    exact = found.held["parameters"] + found.held["optimiser"]
    twice = found._replace(read=compiling.CompiledStep(needed=2 * found.needed - exact))
    other = planned(model, per_device_train_batch_size=1)
    assert advice.scaled(twice, other) == 2 * other.needed - exact


MIXTURE = Path(__file__).resolve().parents[2] / "configs" / "models" / "Qwen3-30B-A3B"


def mixture(rows: int, **fields: Any) -> StepEstimate:
    return planned(
        MIXTURE, "v5p-128", max_length=4096, per_device_train_batch_size=rows,
        gradient_checkpointing="full", **fields,
    )  # fmt: skip


def test_experts_of_their_own_are_proposed_where_gathers_take_the_time(model: Path) -> None:
    """As the compiler says: of one row a chip a step is shorter by a sixth, of four by a hundredth;
    `test_what_travels_to_experts_is_what_the_compiler_says` has the figures."""
    said = advice.faster(mixture(1))
    assert said is not None
    seconds, without = re.findall(r"([\d.]+) s", said)
    assert float(seconds) <= advice.GAIN * float(without) + 0.01
    (words,) = re.findall(r"with (--mesh\.expert \d)", said)
    name, value = words.removeprefix("--").split()
    proposed = mixture(1, **{name: int(value)})
    assert proposed.time is not None
    assert proposed.time.step == pytest.approx(float(seconds), abs=0.006)
    assert advice.faster(mixture(4)) is None
    assert advice.faster(proposed) is None
    assert advice.faster(planned(model)) is None


def test_experts_of_their_own_make_room(model: Path) -> None:
    found = mixture(4)
    needed = mixture(4, **{"mesh.expert": 4}).needed
    assert needed < found.needed
    small = found._replace(hardware=found.hardware._replace(limit=needed))
    assert advice.remedies(small)[0].what == "--mesh.expert 4"
    dense = planned(model, per_device_train_batch_size=8)
    tight = dense._replace(hardware=dense.hardware._replace(limit=round(0.9 * dense.needed)))
    assert not [way for way in advice.remedies(tight) if "expert" in way.what]


@pytest.mark.parametrize(
    ("mesh", "flags"),
    [
        ({}, "--mesh.tensor 2"),
        ({"fsdp": 8}, "--mesh.tensor 2 --mesh.fsdp -1"),
        ({"fsdp": 2, "data": -1}, "--mesh.tensor 2 --mesh.data 4 --mesh.fsdp -1"),
    ],
)
def test_a_mesh_is_proposed_as_it_is_typed(mesh: dict[str, int], flags: str, model: Path) -> None:
    """Whatever takes what is left: two axes cannot."""
    given = {f"mesh.{name}": size for name, size in mesh.items()}
    found = planned(model, per_device_train_batch_size=1, **given)
    small = found._replace(hardware=found.hardware._replace(limit=1))
    changes = {what: config for what, _, config, _ in advice._changes(small)}
    (words,) = (what for what in changes if what.startswith("--mesh.tensor 2 "))
    assert words.startswith(flags)
    typed = words.replace("--", "").split()
    pairs = dict(zip(typed[::2], typed[1::2], strict=True))
    again = load(overrides={**found.config.model_dump(exclude_unset=True), **given, **pairs})
    assert again.mesh == changes[words].mesh


# -- search --------------------------------------------------------------------------------------


def test_search_keeps_the_rows_of_a_step_and_leaves_out_what_cannot_fit(model: Path) -> None:
    config = load(overrides={
        "model_name_or_path": str(model), "per_device_train_batch_size": 4, "max_length": 1024,
    })  # fmt: skip
    subject = PlannedRun(open_model(model, weights=False), 1024)
    there = make_hardware(parse_slice("v5e-8"), compiles=False)
    everything = search.candidates(config, subject, there)
    for each in everything:
        fields = each.fields
        assert fields["global_batch_size"] == 32
        assert math.prod(fields.get(f"mesh.{axis}", 1) for axis in SIZES) == 8
        assert 4 % fields["mesh.tensor"] == 0, "kv heads divide"
    assert {each.fields["gradient_checkpointing"] for each in everything} == {*search.remat_names()}
    assert [each.seconds for each in everything] == sorted(each.seconds for each in everything)
    sizes = sorted(each.needed for each in everything)
    limit = sizes[len(sizes) // 2]
    fewer = search.candidates(config, subject, there._replace(limit=limit))
    assert 0 < len(fewer) < len(everything)
    assert max(each.needed for each in fewer) <= search.SLACK * limit


def test_where_the_logits_do_not_fit_a_smaller_block_is_tried(model: Path) -> None:
    config = load(overrides={
        "model_name_or_path": str(model), "per_device_train_batch_size": 1, "max_length": 1024,
    })  # fmt: skip
    there = make_hardware(parse_slice("v5e-4"), compiles=False)
    base = evaluate_config(config, PlannedRun(open_model(model, weights=False), 1024), there)
    spec = dataclasses.replace(base.work.spec, vocab=400_000)
    base = base._replace(work=base.work._replace(spec=spec))
    whole = sum(memory_model.memory(base.work, base.held).values())
    assert search._smaller_block(base.work, base) is None, "it fits as it is"
    tight = base._replace(hardware=there._replace(limit=round(0.9 * whole)))
    block = search._smaller_block(base.work, tight)
    assert block is not None
    assert block < memory_model.loss_plan(base.work).block
    smaller = memory_model.memory(base.work._replace(block=block), base.held)
    assert sum(smaller.values()) <= round(0.9 * whole)
    least = base.held["parameters"] + base.held["optimiser"]
    assert search._smaller_block(base.work, tight._replace(
        hardware=there._replace(limit=least)
    )) is None, "nothing of the loss makes it fit"  # fmt: skip


def test_slices_are_joined_along_data() -> None:
    there = make_hardware(parse_slice("2xv5e-4"), compiles=False)
    assert {mesh["mesh.data"] for mesh in search.meshes(there, heads=8)} == {2, 4, 8}


def test_experts_are_laid_over_expert_where_there_are_some() -> None:
    there = make_hardware(parse_slice("v5e-8"), compiles=False)
    assert all("mesh.expert" not in mesh for mesh in search.meshes(there, heads=1))
    found = list(search.meshes(there, heads=1, experts=6))
    assert {mesh["mesh.expert"] for mesh in found} == {1, 2}
    assert {math.prod(mesh.values()) for mesh in found} == {8}
    assert len({tuple(mesh.values()) for mesh in found}) == len(found)


# Of a step of Qwen3-30B-A3B on v5p-128, rows of 4096, everything recomputed, by libtpu 0.0.50.1.
@pytest.mark.parametrize(
    ("rows", "expert", "gib", "fsdp", "travelled", "seconds"),
    [
        (4, 1, 16.59, 182.6, 0.0, 3.549),
        (4, 4, 15.21, 48.9, 49.2, 3.501),
        (1, 1, 11.39, 182.5, 0.0, 1.344),
        (1, 4, 11.69, 48.8, 12.7, 1.129),
    ],
)
def test_what_travels_to_experts_is_what_the_compiler_says(
    rows: int, expert: int, gib: float, fsdp: float, travelled: float, seconds: float
) -> None:
    folder = Path(__file__).resolve().parents[2] / "configs" / "models" / "Qwen3-30B-A3B"
    found = planned(
        folder, "v5p-128", max_length=4096, per_device_train_batch_size=rows,
        gradient_checkpointing="full", **{"mesh.expert": expert},
    )  # fmt: skip
    along = memory_model.wire(found.work)
    assert along["fsdp"] / 1e9 == pytest.approx(fsdp, rel=0.05)
    assert along.get("expert", 0) / 1e9 == pytest.approx(travelled, rel=0.05)
    # The rules were found on dense models; of a mixture they are 8 to 16% low, whatever `expert`.
    assert 0.83 < found.needed / 2**30 / gib < 1
    assert found.time is not None
    # And attention is counted as kernels by whole blocks in the compiled figures.
    assert 0.75 < found.time.step / seconds < 1


def test_the_frontier_is_what_nothing_beats() -> None:
    plans = [
        {"fits": fits, "hbm_bytes": size, "tokens_per_second_per_chip": speed}
        for fits, size, speed in (
            (True, 8, 100.0), (True, 9, 100.0), (True, 6, 90.0), (True, 7, 80.0), (False, 1, 500.0),
        )
    ]  # fmt: skip
    assert search.frontier(plans) == [plans[0], plans[2]]


def test_names_of_slices_are_read_back() -> None:
    for name in ("v5e-16", "v5p-128", "v4-8", "tpu7x-8", "2xv5e-256", "h100-8", "cpu", "v6e:4x2"):
        assert parse_slice(name).name == name
    assert larger(parse_slice("v5p-8")) == parse_slice("v5p-16")
    assert larger(parse_slice("h100-4")) == parse_slice("h100-8")
    assert larger(parse_slice("v5e-256")) is None
    with pytest.raises(ConfigError, match="GPUs are planned for one machine of 1 to 8"):
        parse_slice("h100-16")
