"""`ranger-nn plan`: print what a run would do and need, without running it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import ranger_nn
from ranger_nn.cli.arguments import add_train, new_parser
from ranger_nn.cli.loading import load_model, load_shapes, threads
from ranger_nn.errors import InputError


def add_parser(commands: Any) -> None:
    parser = new_parser(
        commands,
        "plan",
        "show the plan for a model and an input",
        "Nothing is run: a shape of any size will do.",
        plan,
    )
    add_train(parser)
    parser.add_argument("--plot", metavar="FILE", help="draw memory over the steps to FILE, such as plan.png")


def plan(chosen: argparse.Namespace) -> None:
    """Plan, draw if asked, print."""
    if chosen.plot is not None and not Path(chosen.plot).suffix:
        raise InputError(f"--plot {chosen.plot!r} must name a file that ends in .png, .svg or .pdf.")
    with threads(chosen):
        model = load_model(chosen, training=chosen.train)
        made = ranger_nn.plan(
            model,
            load_shapes(chosen, model),
            memory=chosen.memory,
            regions=chosen.regions,
            schedule=chosen.schedule,
            training=chosen.train,
        )
    if chosen.plot is not None:
        _draw(made, chosen.plot)
    print(made.to_json() if chosen.json else made)


def _draw(made: Any, path: str) -> None:
    try:
        made.plot(path)
    except ValueError as error:  # matplotlib's, on the ending
        raise InputError(f"--plot {path!r} cannot be drawn: {error}.") from error
