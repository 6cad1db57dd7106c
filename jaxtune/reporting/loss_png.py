"""The loss of a run as a PNG, for a slide or a message. Drawn by matplotlib, which is optional."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtune.config import ConfigError


def save_loss(
    file: Path, name: str, train: Sequence[Mapping[str, Any]], evals: Sequence[Mapping[str, Any]]
) -> None:
    """Draw 1600 x 900 pixels. Raises `ConfigError` where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "png: needs matplotlib. Run: pip install 'jaxtune[report]', or leave --png out."
        ) from None

    # Without pyplot: it would look for a display and keep the figure.
    figure = Figure(figsize=(8, 4.5), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    lines = (  # of one kind: an evaluation's loss is nll, whatever was minimised
        ("training", "#1668b8", "", [(row["step"], row.get("nll", row["loss"])) for row in train]),
        ("evaluation", "#c2500a", "o", [(row["step"], row["eval_loss"]) for row in evals]),
    )
    for label, color, marker, points in lines:
        there = [(step, loss) for step, loss in points if loss is not None]
        if there:
            steps, losses = zip(*there, strict=True)
            axes.plot(steps, losses, color=color, marker=marker, markersize=4, label=label, lw=1.4)
    axes.set_title(_plain(name), loc="left", fontsize=11)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a trained token")
    axes.grid(visible=True, color="#dfe2e6", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False)
    figure.savefig(file, format="png")


def _plain(text: str) -> str:
    """Escape what matplotlib would read as a formula: text between two dollars."""
    return text.replace("$", r"\$")
