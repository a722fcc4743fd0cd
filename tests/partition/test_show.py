"""`show`: what is drawn, for each partition, is what its regions are; what does not suit is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from ranger_nn import Blocks, GraphParts, Grid, InputError, KMeans, MissingExtraError, PartitionError, TimeSlices, show
from ranger_nn.partition.draw import COLOURS
from ranger_nn.partition.graph import GraphSplit

RNG = np.random.default_rng(0)
IMAGE = RNG.random((30, 40, 3))
SEQUENCE = RNG.standard_normal((60, 2))
POINTS = np.concatenate([RNG.normal(at, 0.2, (20, 2)) for at in ((0, 0), (4, 0), (0, 4))])
RING = np.array([range(12), [*range(1, 12), 0]])


def drawn(figure: Any, what: str) -> list[Any]:
    """Artists whose gid begins with these words."""
    return [a for a in figure.findobj(lambda a: f"{a.get_gid()} ".startswith(f"{what} ")) if a.get_visible()]


def box(patch: Any) -> tuple[float, float, float, float]:
    """(top, bottom, left, right) of a rectangle of an image."""
    (x, y), w, h = patch.get_xy(), patch.get_width(), patch.get_height()
    return y, y + h, x, x + w


@pytest.mark.parametrize("grid", [Grid(2, 3), Grid(3, 3, overlap=2), Grid(size=(8, 16), overlap=0.25, window="linear")])
def test_a_grid_on_an_image(grid: Grid) -> None:
    figure, regions = show(grid, IMAGE), grid.regions((30, 40))
    assert [box(p) for p in drawn(figure, "own")] == [(*r.own[0], *r.own[1]) for r in regions]
    assert [t.get_text() for t in drawn(figure, "number")] == [str(r.index) for r in regions]
    reads = {box(p) for p in drawn(figure, "read")}
    assert reads <= {(*r.read[0], *r.read[1]) for r in regions}
    assert bool(reads) == bool(drawn(figure, "shared")) == bool(grid.overlap)
    assert f"{len(regions)} regions" in figure.get_suptitle()


def test_neighbours_differ_in_colour() -> None:
    tones = np.array([p.get_facecolor()[:3] for p in drawn(show(Grid(4, 9), IMAGE), "own")]).reshape(4, 9, 3)
    assert (tones[1:] != tones[:-1]).any(-1).all()
    assert (tones[:, 1:] != tones[:, :-1]).any(-1).all()
    assert {tuple(t) for t in tones.reshape(-1, 3)} <= {to_rgb(c) for c in COLOURS}


def test_blend_weights() -> None:
    grid = Grid(2, 3, overlap=2, window="cosine")
    figure = show(grid, IMAGE)
    assert len(drawn(figure, "weight 0")) == 2
    blend = grid.blend(40, 1)
    assert blend is not None
    for line, values in zip(drawn(figure, "weight 1"), blend, strict=True):
        np.testing.assert_array_equal(line.get_ydata(), values)
    np.testing.assert_allclose(drawn(figure, "sum 1")[0].get_ydata(), 1)


@pytest.mark.parametrize("shape", [(30, 40), (30, 40, 1), (30, 40, 4), (3, 30, 40), (1, 30, 40)])
def test_images_of_each_layout(shape: tuple[int, ...]) -> None:
    figure = show(Grid(2, 2), 100 * RNG.random(shape) - 5)
    pixels = drawn(figure, "image")[0].get_array()
    assert pixels.shape[:2] == (30, 40)
    assert (pixels.min(), pixels.max()) == (0, 1)


def test_tensors() -> None:
    x = torch.rand(3, 8, 8, requires_grad=True)
    pixels = drawn(show(Grid(2, 2), x), "image")[0].get_array()
    np.testing.assert_allclose(pixels, x.detach().movedim(0, -1))


@pytest.mark.parametrize(
    "partition", [TimeSlices(7), TimeSlices(length=25, overlap=4), Grid(4), Grid(4, overlap=0.25, window="cosine")]
)
@pytest.mark.parametrize("x", [SEQUENCE[:, 0], SEQUENCE, RNG.random((60, 12))], ids=["T", "T2", "T12"])
def test_slices_of_a_sequence(partition: Any, x: np.ndarray) -> None:
    figure, regions = show(partition, x), partition.regions((60,))
    spans = [(p.get_x(), p.get_x() + p.get_width()) for p in drawn(figure, "own")]
    assert spans == [r.own[0] for r in regions]
    assert len(drawn(figure, "number")) == len(regions)
    assert len(drawn(figure, "shared")) == (len(regions) - 1 if any(r.own != r.read for r in regions) else 0)
    assert len(drawn(figure, "feature")) == (0 if x.ndim == 2 and x.shape[1] > 8 else x.reshape(60, -1).shape[1])
    assert len(drawn(figure, "weight")) == (4 if getattr(partition, "window", None) else 0)


def test_blocks_of_a_matrix() -> None:
    figure = show(Blocks(2, 3), RNG.standard_normal((5, 7)))
    boxes = [box(p) for p in drawn(figure, "own")]
    assert boxes == [(*row, *column) for row in ((0, 3), (3, 5)) for column in ((0, 3), (3, 5), (5, 7))]
    assert [t.get_text() for t in drawn(figure, "number")] == [f"$W_{{{i},{j}}}$" for i in (0, 1) for j in (0, 1, 2)]


@pytest.mark.parametrize("features", [2, 5])
def test_points_in_the_colours_of_their_clusters(features: int) -> None:
    data = np.pad(POINTS, ((0, 0), (0, features - 2)))
    figure = show(KMeans(3), data)
    dots = drawn(figure, "own")
    assert [len(d.get_offsets()) for d in dots] == [20, 20, 20]
    assert len({tuple(d.get_facecolor()[0]) for d in dots}) == 3
    assert len(drawn(figure, "centre")) == len(drawn(figure, "number")) == 3
    assert len(drawn(figure, "cells")) == (features == 2)


def test_more_clusters_than_colours_differ_in_their_markers() -> None:
    dots = drawn(show(KMeans(9), POINTS), "own")
    kinds = {(tuple(d.get_facecolor()[0]), d.get_paths()[0].vertices.tobytes()) for d in dots}
    assert len(kinds) == 9


def test_balanced_points_and_given_centres() -> None:
    centres = np.array([[0.0, 0], [1, 1], [9, 9]])
    dots = drawn(show(KMeans(3, balanced=True), POINTS, centres=torch.tensor(centres)), "own")
    assert [len(d.get_offsets()) for d in dots] == [20, 20, 20]
    dots = drawn(show(KMeans(3), POINTS, centres=centres), "own")
    near = np.square(POINTS[:, None] - centres).sum(-1).argmin(1)
    assert [len(d.get_offsets()) for d in dots] == np.bincount(near, minlength=3).tolist()


@pytest.mark.parametrize("positions", [None, RNG.random((12, 2))], ids=["spring", "given"])
def test_parts_of_a_graph(positions: np.ndarray | None) -> None:
    parts = GraphParts(3)
    figure, split = show(parts, RING, positions=positions), parts.split(RING, 12)
    dots = drawn(figure, "own")
    assert [len(d.get_offsets()) for d in dots] == np.diff(split.starts).tolist()
    (cut,), (inside,) = drawn(figure, "edges cut"), drawn(figure, "edges inside")
    assert (len(cut.get_segments()), len(inside.get_segments())) == (split.cut, 12 - split.cut)
    (rings,) = drawn(figure, "halo")
    if positions is not None:
        np.testing.assert_allclose(rings.get_offsets(), positions[split.halo_of(0)])
        np.testing.assert_allclose(dots[0].get_offsets(), positions[split.own(0)])
    again = show(GraphSplit.of(np.repeat(range(4), 3), RING), RING)
    assert len(drawn(again, "own")) == 4


def test_parts_of_a_callable() -> None:
    figure = show(lambda x: [x[:, :10], x[:, 5:]], IMAGE[None])
    first, second = drawn(figure, "own")
    assert first.get_array()[:5, :, 3].all()
    assert not first.get_array()[5:, :, 3].any()
    assert second.get_array()[10:, :, 3].all()
    assert drawn(figure, "shared")[0].get_array()[5:10, :, 3].all()
    assert len(drawn(show(lambda x: [x[:, :2], x[:, 2:]], RNG.random((8, 5))), "number")) == 2


def test_many_regions_have_no_numbers() -> None:
    figure = show(Grid(12, 10), IMAGE)
    assert (len(drawn(figure, "own")), len(drawn(figure, "number"))) == (120, 0)


def test_saved_in_the_format_of_the_ending(tmp_path: Path) -> None:
    figure = show(Grid(2, 2), IMAGE, tmp_path / "regions.png", title="four")
    assert figure.get_suptitle() == "four"
    assert (tmp_path / "regions.png").read_bytes().startswith(b"\x89PNG")
    show(TimeSlices(3), SEQUENCE, tmp_path / "slices.svg")
    assert 'id="own 2"' in (tmp_path / "slices.svg").read_text()


@pytest.mark.parametrize(
    ("draw", "error", "says"),
    [
        (lambda: show(Grid(2, 2), np.zeros(9)), InputError, r"one image .* got shape \(9,\)"),
        (lambda: show(Grid(2, 2), np.zeros((2, 3, 8, 8))), InputError, r"x\[0\]"),
        (lambda: show(Grid(2, 2), np.zeros((8, 8, 7))), InputError, r"got shape \(8, 8, 7\)"),
        (lambda: show(Grid(2, 2), np.full((8, 8), np.nan)), InputError, "64 of 64 are NaN"),
        (lambda: show(Grid(9, 2), np.zeros((8, 8))), PartitionError, "9 regions .* 8 elements"),
        (lambda: show(Grid(2, 3, 4), np.zeros((8, 8, 8))), PartitionError, r"cuts 3; .* Grid\(3, 4\)"),
        (lambda: show(TimeSlices(2), np.zeros((2, 8, 3))), InputError, r"one sequence .* got shape \(2, 8, 3\)"),
        (lambda: show(TimeSlices(9), np.zeros(8)), PartitionError, "9 regions .* 8 elements"),
        (lambda: show(Blocks(2, 2), np.zeros(4)), InputError, r"weight matrix .* got shape \(4,\)"),
        (lambda: show(Blocks(5, 2), np.zeros((4, 4))), PartitionError, "5 regions .* 4 elements"),
        (lambda: show(KMeans(2), np.zeros(4)), InputError, r"points .* got shape \(4,\)"),
        (lambda: show(KMeans(2), np.full((4, 2), np.nan)), InputError, "8 of 8 are NaN"),
        (lambda: show(KMeans(2), POINTS, centres=np.zeros((3, 2))), InputError, r"\(2, 2\) .* got \(3, 2\)"),
        (lambda: show(KMeans(2, balanced=True, capacity=4), POINTS), PartitionError, "hold 8, there are 60"),
        (lambda: show(GraphParts(2), np.zeros((3, 2), int)), InputError, r"edges are .* got shape \(3, 2\)"),
        (lambda: show(GraphParts(2), np.array([[0], [1600]])), InputError, "at most 1500 nodes .* 1601"),
        (lambda: show(GraphParts(2), RING, positions=np.zeros((12, 3))), InputError, r"got shape \(12, 3\)"),
        (lambda: show(lambda x: [], np.zeros((2, 2))), PartitionError, "gave no parts"),
        (lambda: show(lambda x: [2 * x], np.ones((2, 2))), InputError, "part 0 computes something else"),
        (lambda: show(lambda x: x.foo, np.zeros((2, 2))), InputError, "it failed: .*'foo'"),
        (lambda: show(lambda x: [x], np.zeros(2)), InputError, r"with its batch.* got shape \(2,\)"),
        (lambda: show("grid", IMAGE), PartitionError, "got 'grid'"),
        (lambda: show(Grid, IMAGE), PartitionError, "got <class"),
        (lambda: show(Grid(2, 2), "a.png"), InputError, "real numbers"),
        (lambda: show(Grid(2, 2), np.zeros((0, 3))), InputError, "at least one element"),
    ],
)
def test_wrong_use(draw: Callable[[], object], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        draw()


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install \"ranger-nn\[plot\]\""):
        show(Grid(2, 2), IMAGE)
