"""Bars: how often a length occurs, and how large a part is beside its target.

Inline SVG without a script. Every bar has its number as a title; the whole has one as its label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from jaxtune.reporting.html.markup import part

_WIDTH, _HEIGHT = 360, 96  # of the drawing, in CSS pixels


class ShareBar(NamedTuple):
    """A part of a whole, 0 to 1: `now`, `before` mixing, and its `target`."""

    now: float
    before: float | None = None
    target: float | None = None


def histogram(caption: str, bins: Mapping[str, Any]) -> Markup:
    """Draw a histogram of the data report: bin i holds the whole numbers from `edges[i]` up to, not
    including, `edges[i + 1]`."""
    edges: Sequence[int] = bins["edges"]
    counts: Sequence[int] = bins["counts"]
    if not counts:
        return Markup("")
    top, step = max(counts), _WIDTH / len(counts)
    bars = []
    for i, count in enumerate(counts):
        first, last = edges[i], edges[i + 1] - 1
        name = f"{first:,}" if first == last else f"{first:,} to {last:,}"
        # One example among many thousands still shows as a line of one pixel.
        height = max(1.0, (_HEIGHT - 4) * count / top) if count else 0.0
        bars.append(
            {
                "x": f"{i * step:.1f}",
                "y": f"{_HEIGHT - height:.1f}",
                "width": f"{step - 1:.1f}",
                "height": f"{height:.1f}",
                "title": f"{name}: {count:,}",
            }
        )
    most = counts.index(top)
    label = (
        f"{caption}: {sum(counts):,} from {edges[0]:,} to {edges[-1] - 1:,} tokens, most "
        f"({top:,}) from {edges[most]:,} to {edges[most + 1] - 1:,}"
    )
    ends = (f"{edges[0]:,}", f"{edges[-1] - 1:,}")
    return part("histogram", caption, label, bars, ends, (_WIDTH, _HEIGHT))


def bar(share: ShareBar) -> Markup:
    """Draw a bar filled as far as `now`, with a thin line for `before` and a mark at the target."""
    label = f"{share.now:.1%}"
    if share.before is not None:
        label += f", before {share.before:.1%}"
    if share.target is not None:
        label += f", target {share.target:.1%}"
    return part("bar", share, label)
