"""Draw a plan: projected memory over the steps, the allowed line and the untouched network's peak."""

from __future__ import annotations

from collections.abc import Sequence

from ranger_nn.errors import MissingExtraError


def plot(model: str, timeline: Sequence[int], untouched: int, allowed: int | None, path: str) -> None:
    """Write a picture (format by the ending of `path`); raises MissingExtraError without matplotlib.

    Args:
        model: its name.
        timeline: bytes at each step.
        untouched, allowed: bytes.
        path: of the picture.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("drawing a plan needs matplotlib: pip install 'ranger-nn[plot]'") from error
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    mega = [n / 1e6 for n in timeline]
    axes.fill_between(range(len(mega)), mega, step="mid", alpha=0.5, label="planned")
    axes.axhline(untouched / 1e6, color="tab:red", linestyle="--", label="untouched peak")
    if allowed is not None:
        axes.axhline(allowed / 1e6, color="black", label="allowed")
    axes.set(xlabel="steps of the program", ylabel="MB", title=f"{model}: memory", yscale="log")
    axes.legend()
    figure.savefig(path)
