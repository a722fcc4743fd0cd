"""The clock of a slide: even shares, and nothing produced too late or too far."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ranger_nn.planning.pace import Clock


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(0, 20), st.integers(0, 20), st.integers(1, 200))
def test_shares_cover_once(steps: int, lead: int, lag: int, size: int) -> None:
    """The shares of all steps follow each other from 0 to the size; leads and lags add none."""
    clock = Clock(steps)
    clock.lead, clock.lag = lead, lag
    at = 0
    for t in range(clock.total):
        stop = clock.end(size, t)
        assert 0 <= stop - at <= -(-size // steps)
        at = stop
    assert at == size
    assert all(clock.end(size, t) == 0 for t in range(-1, lead))
