"""A plan as a page of the terminal, and as the head of a recipe. Takes plain values only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtune.terminal.text import aligned, printable

_GIB = 2**30
_TERMS = {
    "compute": "the compiler's schedule",
    "attention": "attention kernels at half of the peak",
    "exposed": "collectives nothing hides",
    "other_slices": "to other slices",
    "host": "to the host's memory and back",
}
_BY_RULE = {"compute": "matrix products", "attention": "attention"}


def plan_text(plan: Mapping[str, Any]) -> str:
    """The object of `plan --json` as a page."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1)
    lines = [
        f"{printable(plan['model'])}, {count(plan['parameters'])} parameters, "
        f"{count(plan['trained_parameters'])} trained, on {plan['topology']}: "
        f"{plan['chips']} chips, {mesh or 'one device'}",
        f"  a step is {plan['tokens_per_step']:,} tokens: {plan['microbatches']} x "
        f"{plan['rows_per_device']} rows of {plan['row_length']:,} a device; "
        f"gradient_checkpointing {plan['remat']}, attention {plan['attention']}",
        "",
        verdict(plan),
        *_memory(plan),
        *_remedies(plan),
        *_work(plan),
        *_time(plan),
        *(f"  - {printable(text)}" for text in plan["notes"]),
    ]
    return "\n".join(lines)


def verdict(plan: Mapping[str, Any]) -> str:
    """
    >>> verdict({"fits": True, "hbm_bytes": 2**33, "hbm_limit_bytes": 2**34, "reason": None,
    ...          "method": "compiled"})
    'FITS: 8.00 of 16.00 GiB a chip (50%), says the TPU compiler'
    """
    who = "says the TPU compiler" if plan["method"] == "compiled" else "by arithmetic"
    if plan["hbm_limit_bytes"] is None:
        return f"{plan['hbm_bytes'] / _GIB:.2f} GiB, {who}; the limit is not known"
    share = plan["hbm_bytes"] / plan["hbm_limit_bytes"]
    if plan["fits"]:
        sizes = f"{plan['hbm_bytes'] / _GIB:.2f} of {plan['hbm_limit_bytes'] / _GIB:.2f} GiB"
        return f"FITS: {sizes} a chip ({share:.0%}), {who}"
    return f"DOES NOT FIT: {printable(plan['reason'])}"


def _memory(plan: Mapping[str, Any]) -> list[str]:
    sizes = [(name, size, "GiB") for name, size in plan["hbm_by_kind"].items() if size]
    rows = [*sizes, ("host memory", plan["host_bytes"], "GiB a host")]
    cells = [(name, f"{size / _GIB:.2f}", unit) for name, size, unit in rows]
    return [aligned(cells, numbers=range(1, 2)), ""]


def _remedies(plan: Mapping[str, Any]) -> list[str]:
    if plan["fits"]:
        return []
    lines = [
        f"    {remedy['change']}   ({remedy['hbm_bytes'] / _GIB:.2f} GiB, {remedy['verified']}; "
        f"{remedy['costs']})"
        for remedy in plan["ways"]
    ]
    return ["  what would fit, cheapest first:", *(lines or ["    nothing that was tried"]), ""]


def _work(plan: Mapping[str, Any]) -> list[str]:
    flops, least = plan["flops"], plan["flops_without_recomputation"]
    lines = [
        f"  work a step and chip: {flops / 1e12:,.1f} TFLOP, {least / 1e12:,.1f} without "
        "recomputation"
    ]
    if plan["collective_bytes"]:
        along = ", ".join(
            f"{size / 1e9:.2f} along {axis}"
            for axis, size in plan["collective_bytes_by_axis"].items()
        )
        exposed = plan["collective_bytes_exposed"]
        hidden = "" if exposed is None else f", {exposed / 1e9:.2f} of them exposed"
        lines.append(f"  sent: {plan['collective_bytes'] / 1e9:.2f} GB{hidden} ({along})")
    if plan["collective_bytes_by_kind"]:
        kinds = plan["collective_bytes_by_kind"].items()
        lines.append("        " + ", ".join(f"{kind} {size / 1e9:.2f}" for kind, size in kinds))
    return lines


def _time(plan: Mapping[str, Any]) -> list[str]:
    if plan["step_seconds"] is None:
        return ["  time: not estimated for this hardware", ""]
    names = _TERMS if plan["method"] == "compiled" and plan["fits"] else {**_TERMS, **_BY_RULE}
    terms = ", ".join(
        f"{plan['seconds_by_term'][term]:.3f} {name}"
        for term, name in names.items()
        if plan["seconds_by_term"][term] > 0.0005
    )
    lines = [
        f"  time: {plan['step_seconds']:.3f} s a step ({terms})",
        f"        {plan['tokens_per_second_per_chip']:,.0f} tokens/s a chip, MFU {plan['mfu']:.1%}",
    ]
    return [*lines, *_run(plan["run"]), ""]


def _run(run: Mapping[str, Any] | None) -> list[str]:
    if run is None:
        return []
    price = f", {run['price']:,.2f} at {run['price_per_chip_hour']:g}" if "price" in run else ""
    return [
        f"  the run: {run['steps']:,} steps, {duration(run['seconds'])}, "
        f"{run['chip_hours']:,.1f} chip-hours{price}"
    ]


def rate(plan: Mapping[str, Any]) -> str:
    """Speed and memory of a chip in a few words."""
    speed, size = plan["tokens_per_second_per_chip"], plan["hbm_bytes"] / _GIB
    return f"{speed:,.0f} tokens/s in {size:.2f} GiB"


def frontier_text(plans: Sequence[Mapping[str, Any]]) -> str:
    """Memory against speed: a line for each plan, fastest first."""
    rows = [
        (
            f"{plan['hbm_bytes'] / _GIB:.2f}",
            f"{plan['tokens_per_second_per_chip']:,.0f}",
            plan["settings"] + ("" if plan["method"] == "compiled" else "   (arithmetic)"),
        )
        for plan in plans
    ]
    return aligned([("GiB", "tokens/s", "settings"), *rows], numbers=range(2))


def header(plan: Mapping[str, Any]) -> list[str]:
    """The lines of a recipe's head, without the comment sign."""
    lines = [verdict(plan)]
    if plan["step_seconds"] is not None:
        lines.append(
            f"{plan['step_seconds']:.2f} s for a step of {plan['tokens_per_step']:,} tokens, "
            f"{plan['tokens_per_second_per_chip']:,.0f} tokens/s a chip, MFU {plan['mfu']:.0%}, "
            "modelled"
        )
    if plan["versions"]:
        lines.append(", ".join(f"{name} {which}" for name, which in plan["versions"].items()))
    return lines


def count(number: float) -> str:
    """
    >>> [count(n) for n in (8.03e9, 596e6, 12_300)]
    ['8.03 B', '596 M', '12,300']
    """
    if number >= 1e9:
        return f"{number / 1e9:.2f} B"
    return f"{number / 1e6:.0f} M" if number >= 1e6 else f"{number:,}"


def duration(seconds: float) -> str:
    """
    >>> [duration(s) for s in (45, 600, 7300, 200_000)]
    ['45 s', '10 min', '2 h 2 min', '2 d 8 h']
    """
    minutes = round(seconds / 60)
    if seconds < 120:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
