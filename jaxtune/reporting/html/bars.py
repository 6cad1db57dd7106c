"""Bars: how often a length occurs, and how large a part is beside what was asked for.

Inline SVG without a script. Every bar has its number as a title; the whole has one as its label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxtune.reporting.html.markup import Markup, escaped

_WIDTH, _HEIGHT, _LINE = 360, 96, 16  # of the drawing and of its line of numbers, in CSS pixels


class ShareBar(NamedTuple):
    """A part of a whole, 0 to 1: `now`, what it was `before` mixing, and the `target` asked for."""

    now: float
    before: float | None = None
    target: float | None = None


def histogram(caption: str, found: Mapping[str, Any]) -> str:
    """`found` is one of `data.doctor.histograms`: bin i holds the whole numbers from `edges[i]` up
    to, not including, `edges[i + 1]`."""
    edges: Sequence[int] = found["edges"]
    counts: Sequence[int] = found["counts"]
    if not counts:
        return ""
    top, step = max(counts), _WIDTH / len(counts)
    bars = []
    for i, count in enumerate(counts):
        first, last = edges[i], edges[i + 1] - 1
        name = f"{first:,}" if first == last else f"{first:,} to {last:,}"
        # One example among many thousands still shows as a line of one pixel.
        height = max(1.0, (_HEIGHT - 4) * count / top) if count else 0.0
        bars.append(
            f'<rect x="{i * step:.1f}" y="{_HEIGHT - height:.1f}" width="{step - 1:.1f}" '
            f'height="{height:.1f}"><title>{name}: {count:,}</title></rect>'
        )
    most = counts.index(top)
    label = (
        f"{caption}: {sum(counts):,} from {edges[0]:,} to {edges[-1] - 1:,} tokens, most "
        f"({top:,}) from {edges[most]:,} to {edges[most + 1] - 1:,}"
    )
    return (
        f'<figure class="bars"><figcaption>{escaped(caption)}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT + _LINE}" role="img" aria-label="{escaped(label)}">'
        f'<g class="bar">{"".join(bars)}</g>'
        f'<line x1="0" x2="{_WIDTH}" y1="{_HEIGHT}" y2="{_HEIGHT}"></line>'
        f'<text x="0" y="{_HEIGHT + _LINE - 3}">{edges[0]:,}</text>'
        f'<text x="{_WIDTH}" y="{_HEIGHT + _LINE - 3}" text-anchor="end">{edges[-1] - 1:,}</text>'
        "</svg></figure>"
    )


def bar(share: ShareBar) -> Markup:
    """One bar: filled as far as it is now, a thin line below for before, a mark at the target."""
    parts = [f'<rect class="bar" width="{100 * share.now:.2f}" height="9"></rect>']
    said = f"{share.now:.1%}"
    if share.before is not None:
        parts.append(
            f'<rect class="was" y="10" width="{100 * share.before:.2f}" height="2"></rect>'
        )
        said += f", before {share.before:.1%}"
    if share.target is not None:
        x = min(99.0, 100 * share.target)
        parts.append(f'<rect class="aim" x="{x:.2f}" width="1" height="12"></rect>')
        said += f", target {share.target:.1%}"
    return Markup(
        f'<svg class="share" viewBox="0 0 100 12" preserveAspectRatio="none" role="img" '
        f'aria-label="{said}"><title>{said}</title>'
        '<rect class="rail" width="100" height="9"></rect>'
        f"{''.join(parts)}</svg>"
    )
