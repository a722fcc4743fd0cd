"""`bench --train` says why gradients differ, and which side is nearer to float64."""

from __future__ import annotations

import json

import pytest
import torch

from ranger_nn.cli.main import main
from ranger_nn.cli.rounding import explain, gradients_of, relative
from tests.cli.models import Repeated

COST = {"largest_difference": 1e-5, "untouched_seconds": 0.1, "untouched_peak": 1000}


def result_of(capsys, model, *options):
    given = ["bench", f"tests.cli.models:{model}", "1x3x96x96", "--train", "--repeat", "1", "--regions", "16x16"]
    assert main([*given, "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_distances_from_float64(capsys):
    result = result_of(capsys, "Repeated")
    assert result["gradient_of"] in ("conv.weight", "conv.bias")
    assert result["terms"] == 96 * 96
    away = result["from_float64"]
    assert 0 < max(away.values()) < 1e-3
    assert result["nearer_to_float64"] == min(away, key=away.get)
    assert result["gradient_difference"] <= 1.01 * (away["untouched"] + away["regional"])


def test_in_words(capsys):
    assert (
        main(["bench", "tests.cli.models:Repeated", "1x3x96x96", "--train", "--repeat", "1", "--regions", "16x16"]) == 0
    )
    printed = capsys.readouterr().out
    for words in ("gradients ", "9,216 positions", "float32 rounds", "against float64", "nearer: "):
        assert words in printed


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        ("Repeated", ["--dtype", "float64"], "float64 itself"),
        ("Dropping", [], "more than rounding"),
    ],
)
def test_why_no_float64_run_says_anything(capsys, model, options, reason):
    result = result_of(capsys, model, *options)
    assert reason in result["float64_skipped"]
    assert "nearer_to_float64" not in result


def two_sides():
    """A model with its gradient, and one nudged by 1e-3 of its magnitude."""
    torch.manual_seed(0)
    model, x = Repeated(), torch.rand(1, 3, 8, 8)
    run = lambda net, inputs: net(*inputs).sum().backward()  # noqa: E731
    run(model, (x,))
    right = {name: gradient.clone() for name, gradient in gradients_of(model).items()}
    return model, (x,), run, right, {name: gradient * 1.001 for name, gradient in right.items()}


def test_the_nearer_side_is_the_one_that_was_not_nudged():
    model, inputs, run, right, wrong = two_sides()
    found = explain(model, inputs, run, {"untouched": wrong, "regional": right}, COST)
    assert found["nearer_to_float64"] == "regional"
    assert found["from_float64"]["untouched"] == pytest.approx(1e-3, rel=0.01)
    exact = Repeated().double()
    exact.load_state_dict(model.state_dict())
    run(exact, (inputs[0].double(),))
    expected = max(relative(gradient, right[name]) for name, gradient in gradients_of(exact).items())
    assert found["from_float64"]["regional"] == expected


@pytest.mark.parametrize(
    ("cost", "reason"), [({"untouched_seconds": 99.0}, "takes 99 s"), ({"untouched_peak": 1 << 60}, "it needs")]
)
def test_a_run_that_would_cost_too_much(cost, reason):
    model, inputs, run, right, wrong = two_sides()
    assert (
        reason in explain(model, inputs, run, {"untouched": wrong, "regional": right}, COST | cost)["float64_skipped"]
    )


def test_equal_gradients_need_no_explanation():
    model, inputs, run, right, _ = two_sides()
    assert explain(model, inputs, run, {"untouched": right, "regional": right}, COST) == {"gradient_difference": 0.0}
