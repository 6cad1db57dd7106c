"""An engine of slots: whatever its neighbours, slots and calls, a request gets its own answer."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inference.decoding import decode_all
from model.conftest import LIMIT, SPEC
from scipy import stats

from jaxtune.config import ConfigError, DataError
from jaxtune.inference import decode_step as device
from jaxtune.inference.engine import Engine
from jaxtune.inference.sampling import GREEDY, Sampling
from jaxtune.inference.unstack import unstack
from jaxtune.model import decoder
from jaxtune.model.decoder import Params
from jaxtune.model.lora import Lora
from jaxtune.parallel import memory, mesh
from jaxtune.tree import named

rng = np.random.default_rng(2)
PROMPTS = [rng.integers(0, SPEC.vocab, n).tolist() for n in (3, 13, 1, 9, 12, 4, 2, 5)]
LONGEST = (10, 4, 19, 7, 1, 12, 3, 16)
DRAWN = Sampling(0.9, top_k=30, top_p=0.95, repetition_penalty=1.2, seed=11)
# Every other request draws.
MIXED = [GREEDY if i % 2 else DRAWN for i in range(len(PROMPTS))]


def asked(engine: Engine, **options: Any) -> list[list[int]]:
    """All of PROMPTS at once; the answers in order, events checked on the way."""
    requests = [
        engine.submit(prompt, max_new_tokens=most, sampling=sampling, number=i, **options)
        for i, (prompt, most, sampling) in enumerate(zip(PROMPTS, LONGEST, MIXED, strict=True))
    ]
    found = answers(engine)
    assert list(found) == sorted(requests)
    return [found[request] for request in requests]


def answers(engine: Engine, most: int = 32) -> dict[int, list[int]]:
    """Runs the engine empty."""
    found: dict[int, list[int]] = {}
    ended: set[int] = set()
    while engine.busy:
        events = engine.step(most)
        assert events
        for event in events:
            assert event.request not in ended
            assert len(event.tokens) <= most
            found.setdefault(event.request, []).extend(event.tokens)
            if event.finished:
                ended.add(event.request)
    assert engine.step() == []
    assert ended == set(found)
    return dict(sorted(found.items()))


@pytest.fixture(scope="module")
def alone(params: Params) -> list[list[int]]:
    """Every request in an engine that answers nothing else, a token a call."""
    found = []
    for i, (prompt, most, sampling) in enumerate(zip(PROMPTS, LONGEST, MIXED, strict=True)):
        engine = Engine(SPEC, {"params": params}, dtype=jnp.float32, slots=1)
        request = engine.submit(prompt, max_new_tokens=most, sampling=sampling, number=i)
        found.append(answers(engine, most=1)[request])
    assert [len(answer) for answer in found] == list(LONGEST)
    return found


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_refilled_slots_answer_as_if_alone(
    params: Params, alone: list[list[int]], slots: int
) -> None:
    """Greedy and drawn side by side, of unequal lengths, past windows and limits of ropes."""
    assert max(map(len, alone)) + len(PROMPTS[2]) > LIMIT
    engine = Engine(SPEC, {"params": params}, dtype=jnp.float32, slots=slots)
    assert asked(engine) == alone
    assert asked(engine) == alone  # slots that were used before


def test_eight_devices_answer_as_one(params: Params, alone: list[list[int]]) -> None:
    grid = mesh.make_mesh({"data": 2, "fsdp": 2, "tensor": 2, "context": 1})
    shardings = mesh.shardings(decoder.axes(SPEC), decoder.abstract(SPEC, jnp.float32), grid)
    variables = {"params": jax.device_put(params, shardings)}
    engine = Engine(SPEC, variables, dtype=jnp.float32, slots=4, mesh=grid)
    assert asked(engine) == alone


def test_each_request_has_its_own_stop_ids(params: Params, alone: list[list[int]]) -> None:
    engine = Engine(SPEC, {"params": params}, dtype=jnp.float32, slots=3)
    requests = {}
    for i, (prompt, answer) in enumerate(zip(PROMPTS, alone, strict=True)):
        stop_ids = {answer[-1]} if i % 3 else set()
        options = {"max_new_tokens": LONGEST[i], "stop_ids": stop_ids, "sampling": MIXED[i]}
        requests[engine.submit(prompt, number=i, **options)] = (answer, stop_ids)
    ends: dict[int, str | None] = {}
    found: dict[int, list[int]] = {request: [] for request in requests}
    while engine.busy:
        for event in engine.step():
            found[event.request] += event.tokens
            ends[event.request] = event.reason
    for request, (answer, stop_ids) in requests.items():
        stopped = [n for n, token in enumerate(answer) if token in stop_ids]
        assert found[request] == answer[: stopped[0] if stopped else None]
        assert ends[request] == ("stop" if stopped else "length")


def test_first_come_first_served(params: Params) -> None:
    """With two slots, requests begin in the order they came in, and a long one holds up nobody."""
    engine = Engine(SPEC, {"params": params}, dtype=jnp.float32, slots=2)
    long = engine.submit([1, 2], max_new_tokens=40)
    short = [engine.submit([3, i], max_new_tokens=3) for i in range(12)]
    assert (engine.busy, engine.waiting) == (True, 13)
    begun: list[int] = []
    ended: list[int] = []
    while engine.busy:
        running = set()
        for event in engine.step(2):
            running.add(event.request)
            begun += [event.request] if event.request not in begun else []
            ended += [event.request] if event.finished else []
        assert len(running) <= 2
    assert begun == [long, *short]
    assert [request for request in ended if request != long] == short
    assert ended.index(long) > 6


@pytest.mark.slow
def test_later_requests_join_those_that_run(params: Params, alone: list[list[int]]) -> None:
    """Also one that is longer than all before, for which every slot is made longer."""
    engine = Engine(SPEC, {"params": params}, dtype=jnp.float32, slots=4)
    first = engine.submit(PROMPTS[5], max_new_tokens=LONGEST[5], number=5)
    found: dict[int, list[int]] = {first: []}
    for _ in range(3):
        for event in engine.step(2):
            found[event.request] += event.tokens
    long = engine.submit(PROMPTS[1] * 3, max_new_tokens=20)  # 59 of 64 positions
    second = engine.submit(PROMPTS[3], max_new_tokens=LONGEST[3], number=3)
    for request, tokens in answers(engine).items():
        found[request] = found.get(request, []) + tokens
    assert (found[first], found[second]) == (alone[5], alone[3])
    fresh = Engine(SPEC, {"params": params}, dtype=jnp.float32, slots=4)
    fresh.submit(PROMPTS[1] * 3, max_new_tokens=20)
    assert [found[long]] == list(answers(fresh).values())


@pytest.mark.slow
def test_cancelled_requests_leave_at_once(params: Params, alone: list[list[int]]) -> None:
    engine = Engine(SPEC, {"params": params}, dtype=jnp.float32, slots=2)

    def submit(i: int) -> int:
        return engine.submit(PROMPTS[i], max_new_tokens=LONGEST[i], sampling=MIXED[i], number=i)

    running, waiting, kept, last = submit(0), submit(2), submit(5), submit(7)
    engine.cancel(waiting)
    early = {event.request: list(event.tokens) for event in engine.step()}
    assert early.keys() == {running, kept}
    engine.cancel(running)
    engine.cancel(running)  # no matter
    found = answers(engine)
    assert found.keys() == {kept, last}
    assert early[kept] + found[kept] == alone[5]
    assert found[last] == alone[7]
    assert not engine.busy


def test_a_cancelled_text_is_written_no_further(params: Params) -> None:
    """Also where nobody takes its slot."""
    engine = Engine(SPEC, {"params": params}, dtype=jnp.float32, slots=2)
    endless = engine.submit(PROMPTS[0], max_new_tokens=29)
    engine.submit(PROMPTS[5], max_new_tokens=28)
    engine.step()
    engine.cancel(endless)
    answers(engine, most=8)
    assert engine._slots is not None
    assert not np.asarray(engine._slots.left).any()
    assert np.asarray(engine._slots.written).sum() == 1 + 28


def test_generate_numbers_its_prompts(params: Params) -> None:
    """Equal prompts are drawn apart, and by their place in the list alone."""
    run = functools.partial(
        decode_all, SPEC, params, max_new_tokens=6, stop_ids=(), dtype=jnp.float32, sampling=DRAWN
    )
    prompts = [PROMPTS[0]] * 4 + [PROMPTS[5]] * 2
    found = run(prompts, batch_size=4)
    assert len({tuple(generation.tokens) for generation in found[:4]}) == 4
    assert run(prompts[:3], batch_size=2) == found[:3]
    other = Sampling(**{**DRAWN.__dict__, "seed": 12})
    assert run(prompts, batch_size=4, sampling=other) != found
    engine = Engine(SPEC, {"params": params}, dtype=jnp.float32, slots=1)
    engine.submit(prompts[2], max_new_tokens=6, sampling=DRAWN, number=2)
    assert list(answers(engine).values()) == [found[2].tokens]


def test_first_tokens_are_of_the_model_s_distribution(params: Params) -> None:
    prompt, draws = PROMPTS[1], 2000
    inputs = jnp.asarray([prompt])
    logits_BTV = decoder.logits(
        SPEC,
        {"params": params},
        inputs,
        segment_ids=jnp.ones_like(inputs),
        positions=jnp.arange(len(prompt))[None],
        dtype=jnp.float32,
    )
    shares = np.asarray(jax.nn.softmax(logits_BTV[0, -1] / 2.0)).astype(np.float64)
    found = decode_all(
        SPEC,
        params,
        [prompt] * draws,
        max_new_tokens=1,
        stop_ids=(),
        dtype=jnp.float32,
        batch_size=64,
        sampling=Sampling(2.0, seed=5),
    )
    counts = np.bincount([each.tokens[0] for each in found], minlength=SPEC.vocab)
    often = shares * draws >= 8
    seen = [*counts[often], counts[~often].sum()]
    due = np.array([*shares[often], shares[~often].sum()]) * draws
    assert len(seen) > 10
    assert stats.chisquare(seen, due * (sum(seen) / due.sum())).pvalue > 1e-3


@pytest.mark.slow
def test_adapters_beside_the_weights(params: Params) -> None:
    """As if merged; without them the base, from the same arrays."""
    lora = Lora(r=2, alpha=8.0)
    adapters = decoder.init_adapters(SPEC, lora, params, jax.random.key(1))
    noise = np.random.default_rng(0)
    adapters = jax.tree.map(lambda x: x + 0.3 * noise.normal(size=x.shape), adapters)

    def merge(tree: Any, path: str = "") -> Any:
        if not isinstance(tree, dict):
            return tree
        leaves = named(adapters)
        if f"{path}/a" not in leaves:
            return {key: merge(each, f"{path}/{key}".strip("/")) for key, each in tree.items()}
        a, b, kernel = leaves[f"{path}/a"], leaves[f"{path}/b"], tree["kernel"]
        flat = jnp.einsum(
            "LIR,LRO->LIO", a.reshape(len(a), -1, a.shape[-1]), b.reshape(*b.shape[:2], -1)
        )
        return {**tree, "kernel": kernel + lora.scale * flat.reshape(kernel.shape)}

    def run(variables: Any, lora: Lora | None = None) -> list[list[int]]:
        engine = Engine(SPEC, variables, dtype=jnp.float32, slots=8, lora=lora)
        return asked(engine)

    base, merged = run({"params": params}), run({"params": merge(params)})
    assert base != merged
    assert run({"params": params, "lora": adapters}, lora) == merged


def test_layer_by_layer_is_the_same_model(params: Params, alone: list[list[int]]) -> None:
    """What a CPU is asked is what any other is."""
    spec, variables = unstack(SPEC, {"params": params}, platform="cpu")
    assert [stack.repeats for stack in spec.stacks] == [1, 1, 1]
    assert spec.layers == SPEC.layers
    assert unstack(SPEC, {"params": params}, platform="tpu") == (SPEC, {"params": params})
    again = unstack(spec, variables, platform="cpu")
    assert again[1] is variables
    inputs = jnp.asarray([PROMPTS[1]])
    places = {"segment_ids": jnp.ones_like(inputs), "positions": jnp.arange(13)[None]}
    np.testing.assert_allclose(
        decoder.logits(spec, variables, inputs, **places, dtype=jnp.float32),
        decoder.logits(SPEC, {"params": params}, inputs, **places, dtype=jnp.float32),
        rtol=0,
        atol=1e-5,
    )


def test_a_stack_is_decoded_as_its_layers_are(
    params: Params, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of TPUs and GPUs, run here."""
    monkeypatch.setattr(
        "jaxtune.inference.engine.unstack", lambda spec, variables, **_: (spec, variables)
    )
    engine = Engine(SPEC, {"params": params}, dtype=jnp.float32, slots=8)
    assert asked(engine) == alone


def test_consumed_weights_are_gone(params: Params) -> None:
    copy = jax.tree.map(lambda leaf: leaf + 0, params)
    _, found = unstack(SPEC, {"params": copy}, platform="cpu", consume=True)
    assert copy["stack_0"]["layer_0"]["mlp"]["up"]["kernel"].is_deleted()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(found))


def test_refusals(params: Params) -> None:
    def engine(slots: int = 1, **options: Any) -> Engine:
        return Engine(SPEC, {"params": params}, dtype=jnp.float32, slots=slots, **options)

    with pytest.raises(ConfigError, match="slots is 0; expected at least 1"):
        engine(0)
    with pytest.raises(DataError, match="prompt 0 has no tokens"):
        engine().submit([], max_new_tokens=1)
    with pytest.raises(ConfigError, match="max_new_tokens is 0; expected at least 1"):
        engine().submit([1], max_new_tokens=0)
    small = engine(max_length=8)
    with pytest.raises(DataError, match="prompt 3 has 8 tokens; here are 8 positions, and the"):
        small.submit([1] * 8, max_new_tokens=1, number=3)
    small.submit([1] * 6, max_new_tokens=9)
    assert [len(answer) for answer in answers(small).values()] == [2]


@pytest.mark.parametrize("where", ["empty", "grow", "prefill", "decode"])
def test_without_memory_one_is_given_up_and_the_others_go_on(
    params: Params, alone: list[list[int]], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that asks for most of those that came last; also where what failed has consumed the
    slots: the others are read again, with what they have said."""
    engine = Engine(SPEC, {"params": params}, dtype=jnp.float32, slots=6)
    requests: dict[int, int] = {}
    found: dict[int, list[int]] = {}

    def submit(i: int) -> None:
        options: Any = {"max_new_tokens": LONGEST[i], "sampling": MIXED[i], "number": i}
        requests[engine.submit(PROMPTS[i], **options)] = i

    def step() -> None:
        for event in engine.step(2):
            found.setdefault(event.request, []).extend(event.tokens)

    def run() -> None:
        while engine.busy:
            step()

    def fails(*args: Any, **options: Any) -> Any:
        monkeypatch.undo()
        getattr(device, where)(*args, **options)
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    begun = [] if where == "empty" else [0, 1, 3]
    for i in begun:
        submit(i)
        step()
    for i in (4, 7):
        submit(i)
    large = engine.submit(PROMPTS[2], max_new_tokens=100)
    monkeypatch.setattr(device, where, fails)
    with pytest.raises(jax.errors.JaxRuntimeError):
        run()
    assert engine.give_up() == large
    run()
    assert [found[request] for request in requests] == [alone[i] for i in requests.values()]


def test_an_allocation_that_is_refused_leaves_an_engine_that_answers(
    params: Params, alone: list[list[int]]
) -> None:
    """A real one, of more bytes than any machine has."""
    spec = dataclasses.replace(SPEC, max_positions=2**31 - 1)
    engine = Engine(spec, {"params": params}, dtype=jnp.float32, slots=8)
    large = engine.submit(PROMPTS[0], max_new_tokens=2**31 - 100)
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        engine.step()
    assert memory.is_exhausted(caught.value)
    assert engine.give_up() == large
    assert asked(engine) == alone
