"""Draw a plan: projected memory over the steps, the allowed line and the untouched network's peak."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ranger_nn.errors import MissingExtraError

if TYPE_CHECKING:
    from ranger_nn.planning.report import Plan


def plot(plan: Plan, path: str) -> None:
    """Write a picture (format by the ending of `path`); raises MissingExtraError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("drawing a plan needs matplotlib: pip install 'ranger-nn[plot]'") from error
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    mega = [n / 1e6 for n in plan.timeline]
    axes.fill_between(range(len(mega)), mega, step="mid", alpha=0.5, label="planned")
    axes.axhline(plan.untouched / 1e6, color="tab:red", linestyle="--", label="untouched peak")
    if plan.allowed is not None:
        axes.axhline(plan.allowed / 1e6, color="black", label="allowed")
    axes.set(xlabel="steps of the program", ylabel="MB", title=f"{plan.model}: memory", yscale="log")
    axes.legend()
    figure.savefig(path)
