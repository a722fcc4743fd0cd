"""What runs again after a stop is enough, and no more than the halo."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ranger_nn.core.program import ALLOC, RUN, WRITE
from ranger_nn.execute.resume import boundaries, replay
from ranger_nn.planning.search import Options, make_plan
from ranger_nn.torch.capture import capture
from ranger_nn.torch.module import example_inputs

NETS = {
    "deep": nn.Sequential(*[nn.Conv2d(2, 2, 3, padding=1) for _ in range(4)]),
    "strided": nn.Sequential(
        nn.Conv2d(2, 4, 3, 2, 1), nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(4, 2, 5, padding=2)
    ),
    "norms": nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.InstanceNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1)
    ),
}


def made(name, rows, steps, schedule):
    net = NETS[name].eval()
    graph = capture(net, example_inputs(net, (1, 2, rows, 24)), grad=False).graph
    regions = (max(1, rows // steps), 24) if schedule == "slide" else (max(1, rows // steps), 12)
    options = Options(None, regions, schedule, disk=True)
    return make_plan(graph, options, False).forward


def read(i):
    return {slot for r in i.reads for slot, _ in r.parts}


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(sorted(NETS)), st.integers(20, 60), st.integers(2, 9), st.sampled_from(["slide", "tile"]))
def test_everything_that_is_read_is_there(name, rows, steps, schedule):
    """Replay the slots: from what is outside and kept, each instruction finds what it reads, at every boundary."""
    program = made(name, rows, steps, schedule)
    ends = boundaries(program, set())
    assert [e.at for e in ends] == sorted({e.at for e in ends})
    assert ends[-1].at == len(program.instructions)
    for end in ends:
        again = replay(program, end)
        alive = set(program.external.values()) | set(end.states)
        for i in [*again, *program.instructions[end.at :]]:
            assert read(i) <= alive
            alive |= set(i.outs)
            alive -= set(i.frees)
        assert set(program.results.values()) <= alive
        assert not any(i.op == WRITE for i in again)


def test_only_the_halo_runs_again():
    program = made("deep", 400, 40, "slide")
    ends = boundaries(program, set())
    middle = ends[len(ends) // 2]
    rows = [i.out_box[2] for i in replay(program, middle) if i.op == RUN]
    assert sum(b - a for a, b in rows) < 4 * 40  # four convolutions, of 400 rows each
    nothing_left = replay(program, ends[-1])
    assert all(i.op == ALLOC for i in nothing_left)


@pytest.mark.parametrize("name", sorted(NETS))
def test_states_are_kept_not_computed_again(name):
    program = made(name, 60, 6, "slide")
    kept = [end.states for end in boundaries(program, set())]
    assert any(kept) == (name == "norms")
