"""The cost of a compiled program, read from its optimised HLO: FLOPs, wire bytes, scheduled cycles.

XLA's own `cost_analysis` counts the body of a loop once and knows no network; here every
computation is walked from the entry, loops as often as they turn. Text in, numbers out: no JAX, no
devices. All figures are of one chip.

    matmul_flops     every dot and convolution, those inside fusions too
    kernel_flops     Pallas attention and grouped matmul (by shape, or by the cost they declare)
    cycles           the compiler's schedule: `estimated_cycles` of every fusion
    wire             bytes a chip sends, by kind of collective (ring algorithm), and of those the
                     exposed: in collectives that nothing is scheduled beside
    axes             the same bytes by the mesh axes that a collective runs along
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

COLLECTIVES = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
)
_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s4": 0.5, "u4": 0.5, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "f8e4m3fn": 1, "f8e5m2": 1,
    "f8e4m3b11fnuz": 1, "token": 0,
}  # fmt: skip
_SHAPE = re.compile(rf"\b({'|'.join(_BYTES)})\[([0-9,]*)\]")
_NAMES = re.compile(r"%([^\s,(){}]+)")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|async_execution_computation|called_computation)=%([^\s,]+)"
)


# What stands for cycles where the compiler has no estimate: the largest int64, of lookups that
# libtpu 0.0.50 gives to a v6e's sparse cores. They run beside the rest and are not counted.
_NO_ESTIMATE = 2**62


class Shape(NamedTuple):
    dtype: str
    sizes: tuple[int, ...]

    @property
    def bytes(self) -> float:
        return _BYTES[self.dtype] * math.prod(self.sizes)


class Instruction(NamedTuple):
    """A line of HLO; `rest` is what stands behind its operands."""

    name: str
    op: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    inside: str  # the parentheses of the operation: an index or a constant's value
    rest: str

    def attribute(self, name: str) -> str | None:
        value = re.search(rf"\b{name}=%?([^\s,]+)", self.rest)
        return value[1] if value else None


class Computation(NamedTuple):
    name: str
    instructions: Mapping[str, Instruction]
    root: Instruction

    def shapes(self, instruction: Instruction) -> Iterator[Shape]:
        """Of all operands."""
        for name in instruction.operands:
            if name in self.instructions:
                yield from self.instructions[name].shapes


class Module(NamedTuple):
    computations: Mapping[str, Computation]
    entry: Computation


def parse(text: str) -> Module:
    """Optimised HLO as `compiled.as_text()` gives it."""
    computations: dict[str, Computation] = {}
    instructions: dict[str, Instruction] = {}
    entry, name, root = "", "", None
    for line in _lines(text):
        if opening := re.match(r"(ENTRY )?%?([^\s(]+) \(.*\{$", line):
            name, instructions, root = opening[2], {}, None
            entry = name if opening[1] else entry
        elif line.startswith("}") and root is not None:
            computations[name] = Computation(name, instructions, root)
        elif instruction := _instruction(line):
            instructions[instruction.name] = instruction
            if line.lstrip().startswith("ROOT") or root is None:
                root = instruction
    return Module(computations, computations[entry])


def _lines(text: str) -> Iterator[str]:
    """Lines, those joined that a kernel's attributes have broken."""
    whole = ""
    for line in text.splitlines():
        if re.match(r"(\s+(ROOT )?%|%|ENTRY |\}|HloModule|\s*$)", line):
            yield whole
            whole = line
        else:
            whole += " " + line
    yield whole


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"\s+(?:ROOT )?%(\S+) = ", line)
    if head is None:
        return None
    body = line[head.end() :]
    end = _closing(body, 0) if body[0] == "(" else body.index(" ")
    kind, body = body[:end], body[end:].lstrip()
    opening = body.index("(")
    closing = _closing(body, opening)
    inside = body[opening + 1 : closing - 1]
    shapes = tuple(
        Shape(dtype, tuple(int(n) for n in sizes.split(",") if n))
        for dtype, sizes in _SHAPE.findall(kind)
    )
    return Instruction(
        head[1], body[:opening], shapes, tuple(_NAMES.findall(inside)), inside, body[closing:]
    )


def _closing(text: str, start: int) -> int:
    """Just behind the parenthesis that closes the one at `start`."""
    depth = 0
    for at in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return at + 1
    raise ValueError(f"no closing parenthesis in {text[start : start + 80]!r}")


class Wire(NamedTuple):
    """Of one kind of collective: bytes sent, and of those the exposed."""

    bytes: float = 0.0
    exposed: float = 0.0


@dataclass
class Cost:
    """Of one chip and one run of the program."""

    matmul_flops: float = 0.0
    kernel_flops: float = 0.0
    cycles: float = 0.0
    wire: dict[str, Wire] = field(default_factory=dict)
    axes: dict[str, float] = field(default_factory=dict)
    loops_unread: int = 0  # counted as one turn each

    @property
    def wire_bytes(self) -> float:
        return sum(kind.bytes for kind in self.wire.values())

    @property
    def exposed_bytes(self) -> float:
        return sum(kind.exposed for kind in self.wire.values())


def cost(text: str, devices: int, mesh: Mapping[str, int] | None = None) -> Cost:
    """The figures of a program for `devices` devices, which `mesh` names the axes of, in order."""
    walk = _Walk(parse(text), devices, mesh or {})
    walk.visit(walk.module.entry, 1, fused=False, hidden=False, seen=set())
    return walk.cost


class _Walk:
    def __init__(self, module: Module, devices: int, mesh: Mapping[str, int]) -> None:
        self.module = module
        self.devices = devices
        self.mesh = mesh
        self.cost = Cost()

    def visit(
        self, at: Computation, times: int, *, fused: bool, hidden: bool, seen: set[str]
    ) -> None:
        """`fused`: part of a scheduled instruction, whose cycles are counted already; `hidden`:
        work is scheduled beside it; `seen`: channels of split collectives that were counted."""
        for each in at.instructions.values():
            if each.op.endswith(("-done", "-update")):
                continue
            kind = each.op.removesuffix("-start")
            if kind in COLLECTIVES:
                self._collective(at, each, kind, times, hidden, seen)
            elif each.op in ("dot", "convolution"):
                self.cost.matmul_flops += times * _flops(at, each)
            elif each.op == "custom-call" and each.attribute("custom_call_target") == (
                '"tpu_custom_call"'
            ):
                self.cost.kernel_flops += times * _kernel_flops(at, each)
            if not fused and (estimate := re.search(r'"estimated_cycles":"(\d+)"', each.rest)):
                known = int(estimate[1]) < _NO_ESTIMATE
                self.cost.cycles += times * int(estimate[1]) if known else 0
            if each.op == "while":
                turns = turns_of(self.module, at, each)
                self.cost.loops_unread += turns is None
                turns = 1 if turns is None else turns
                body = self.module.computations[each.attribute("body") or ""]
                self.visit(body, times * turns, fused=fused, hidden=hidden, seen=set())
            elif each.op in ("fusion", "call", "call-start", "async-start", "conditional"):
                for name in self._called(each):
                    # A fusion around a collective is one that hides it behind the rest of it,
                    # but for the reduce-scatter, which XLA writes as a fusion of its own.
                    around = each.op == "fusion" and self._communicates(name)
                    beside = around and "all-reduce-scatter" not in name
                    scheduled = "estimated_cycles" in each.rest or not around
                    self.visit(
                        self.module.computations[name],
                        times,
                        fused=fused or (each.op == "fusion" and scheduled),
                        hidden=hidden or beside or each.op.endswith("-start"),
                        seen=seen,
                    )

    def _called(self, each: Instruction) -> list[str]:
        """Find the computations that an instruction runs; of a conditional the longer branch."""
        known = self.module.computations
        branches = re.findall(r"(?:true|false)_computation=%([^\s,]+)", each.rest)
        for listed in re.findall(r"branch_computations=\{([^}]*)\}", each.rest):
            branches += _NAMES.findall(listed)
        if branches:
            return [max(branches, key=lambda name: len(known[name].instructions))]
        return [name for name in _CALLED.findall(each.rest) if name in known]

    def _communicates(self, name: str) -> bool:
        at = self.module.computations[name]
        return any(
            each.op.startswith(COLLECTIVES) or any(map(self._communicates, self._called(each)))
            for each in at.instructions.values()
            if each.op != "while"
        )

    def _collective(
        self,
        at: Computation,
        each: Instruction,
        kind: str,
        times: int,
        hidden: bool,
        seen: set[str],
    ) -> None:
        channel = each.attribute("channel_id")
        if hidden and channel is not None:
            if channel in seen:
                return
            seen.add(channel)
        if kind == "all-reduce" and "all-reduce-scatter" in at.name:
            kind = "reduce-scatter"
        group = group_of(each.rest, self.devices)
        sent = times * _sent(kind, sum(s.bytes for s in at.shapes(each)), len(group))
        before = self.cost.wire.get(kind, Wire())
        exposed = 0.0 if hidden or each.op.endswith("-start") else sent
        self.cost.wire[kind] = Wire(before.bytes + sent, before.exposed + exposed)
        if self.mesh and sent:
            along = "+".join(axes_along(group, self.mesh))
            self.cost.axes[along] = self.cost.axes.get(along, 0.0) + sent


def group_of(rest: str, devices: int) -> tuple[int, ...]:
    """The first group of devices that a collective runs in, numbered as the mesh counts them;
    of a permutation all that pass on to each other from device 0."""
    if match := re.search(r"source_target_pairs=\{(\{.*?\})\}", rest):
        pairs = re.findall(r"\{(\d+),(\d+)\}", match[1])
        return _cycle({int(source): int(target) for source, target in pairs})
    if match := re.search(r"replica_groups=\{\{([0-9,]+)\}", rest):
        return tuple(int(n) for n in match[1].split(","))
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        sizes = [int(n) for n in match[3].split(",")]
        order = [int(n) for n in (match[4] or "").split(",") if n] or list(range(len(sizes)))
        ids = _count(sizes, order)
        return tuple(ids[: int(match[2])])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        return _group_on_mesh(match[1], match[2])
    return tuple(range(devices))


def _cycle(following: Mapping[int, int]) -> tuple[int, ...]:
    at, seen = next(iter(following)), []
    while at not in seen:
        seen.append(at)
        at = following.get(at, seen[0])
    return tuple(seen)


def _count(sizes: Sequence[int], order: Sequence[int]) -> list[int]:
    """iota(sizes) transposed by `order`, flat."""
    ids = np.arange(math.prod(sizes)).reshape(sizes).transpose(order)
    return [int(number) for number in ids.flat]


def _group_on_mesh(mesh: str, along: str) -> tuple[int, ...]:
    """`'data'=2,'fsdp'=4` and `'fsdp'`, or a part of an axis: `'fsdp':(2)2`, the 2 inside of 2."""
    axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    sizes: list[int] = []
    chosen: list[int] = []
    parts = {
        name: (int(outer or 1), int(size or axes.get(name, 1)))
        for name, outer, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", along)
    }
    for name, size in axes.items():
        outer, part = parts.get(name, (1, 1))
        chosen += [len(sizes) + 1] if name in parts else []
        sizes += [outer, part, size // (outer * part)]
    rest = [i for i in range(len(sizes)) if i not in chosen]
    return tuple(_count(sizes, [*rest, *chosen])[: math.prod(sizes[i] for i in chosen)])


def axes_along(group: Sequence[int], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes of `mesh` whose coordinate differs between devices of a group.

    >>> axes_along((0, 4), {"data": 2, "fsdp": 4})
    ('data',)
    """
    places = np.unravel_index(group, tuple(mesh.values()))
    return tuple(name for name, at in zip(mesh, places, strict=True) if np.ptp(at) > 0)


def _sent(kind: str, operands: float, group: int) -> float:
    """Bytes one device sends, by the ring algorithm, of `operands` bytes it holds."""
    if kind == "collective-permute":
        return operands
    if kind == "all-gather":
        return operands * (group - 1)
    return operands * (group - 1) / group * (2 if kind == "all-reduce" else 1)


def turns_of(module: Module, at: Computation, loop: Instruction) -> int | None:
    """Count the turns of `for (i = start; i < end; i += step)`; None for another loop.

    Where only the run knows, the program states it: a loop in a scope named `turns_4`.
    """
    if expected := re.search(r'op_name="[^"]*turns_(\d+)\)*/while"', loop.rest):
        return int(expected[1])
    condition, body = (
        module.computations[loop.attribute(name) or ""] for name in ("condition", "body")
    )
    compared = _compared(module, condition)
    ends = [int(each.inside) for each in compared if each.op == "constant"]
    counters = [each for each in compared if each.op == "get-tuple-element"]
    if len(ends) != 1 or len(counters) != 1:
        return None
    index = int(counters[0].attribute("index") or 0)
    start = _element(at, at.instructions[loop.operands[0]], index)
    following = _element(body, body.root, index)
    steps = [
        int(each.inside)
        for name in (following.operands if following.op == "add" else ())
        if (each := body.instructions[name]).op == "constant"
    ]
    first = int(start.inside) if start.op == "constant" else 0
    return max(0, -(-(ends[0] - first) // (steps[0] if steps else 1)))


def _compared(module: Module, condition: Computation) -> list[Instruction]:
    """The two values that decide whether a loop goes on; a fusion may hold their comparison."""
    root = condition.root
    if root.op != "fusion":
        return [condition.instructions[name] for name in root.operands]
    inner = module.computations[root.attribute("calls") or ""]
    return [
        condition.instructions[root.operands[int(part.inside)]] if part.op == "parameter" else part
        for part in (inner.instructions[name] for name in inner.root.operands)
    ]


def _element(at: Computation, value: Instruction, index: int) -> Instruction:
    """Element `index` of a tuple, seen through copies."""
    while value.op in ("tuple", "copy", "bitcast"):
        value = at.instructions[value.operands[index if value.op == "tuple" else 0]]
    return value


def _flops(at: Computation, each: Instruction) -> float:
    left, right = (at.instructions[name].shapes[0].sizes for name in each.operands[:2])
    out = each.shapes[0].sizes
    if each.op == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([0-9,]*)\}", each.rest)
        summed = [left[int(n)] for n in (contracted[1] if contracted else "").split(",") if n]
        return 2.0 * math.prod(out) * math.prod(summed)
    labels = re.search(r"dim_labels=(\S+?)_(\S+?)->([^\s,]+)", each.rest)
    if labels is None:
        return 0.0
    of_left, of_right, of_out = labels[1], labels[2], labels[3]
    flops = 2.0 * out[of_out.index("b")] * out[of_out.index("f")] * right[of_right.index("i")]
    window = dict(
        re.findall(r"(\w+)=(\S+)", (re.search(r"window=\{([^}]*)\}", each.rest) or "0")[0])
    )
    for n in range(len(of_left) - 2):
        flops *= _pairs(
            left[of_left.index(str(n))],
            right[of_right.index(str(n))],
            out[of_out.index(str(n))],
            {name: value.strip("{}").split("x")[n] for name, value in window.items()},
        )
    return flops


def _pairs(data: int, kernel: int, out: int, window: Mapping[str, str]) -> int:
    """Pairs of (output, kernel) positions of one spatial dimension that meet data, not padding."""
    stride, left_step, right_step = (
        int(window.get(name, 1)) for name in ("stride", "lhs_dilate", "rhs_dilate")
    )
    padding = int(window.get("pad", "0_0").split("_")[0])
    last = (data - 1) * left_step
    places = (o * stride + k * right_step - padding for o in range(out) for k in range(kernel))
    return sum(0 <= place <= last and place % left_step == 0 for place in places)


def _kernel_flops(at: Computation, each: Instruction) -> float:
    """Grouped matmul and attention by their shapes, causal attention counted by half; other
    kernels by the cost they declare."""
    name = re.sub(r"[.\d]+$", "", each.name)
    arrays = [
        part.shapes[0].sizes
        for operand in each.operands
        if (part := at.instructions.get(operand)) is not None
        and part.shapes
        and part.shapes[0].dtype in ("bf16", "f32")
        and len(part.shapes[0].sizes) >= 2
    ]
    if "gmm" in name and len(arrays) >= 2:
        left, right = arrays[:2]
        if len(right) == 2:
            return 2.0 * math.prod(left) * right[-1]
        return 2.0 * math.prod(left) * (right[-1] if right[-2] in left else right[-2])
    if declared := re.search(r'"cost_estimate":\{"flops":"(\d+)"', each.rest):
        return float(declared[1])
    products = 0
    if "dkv" in name:
        products = 5 if len(each.shapes) >= 3 else 4
    elif "dq" in name:
        products = 3
    elif re.search("splash|flash|attention", name):
        products = 2
    arrays = [sizes for sizes in arrays if len(sizes) >= 3]
    if not products or len(arrays) < 2:
        return 0.0
    return float(products * math.prod(arrays[0]) * arrays[1][-2])
