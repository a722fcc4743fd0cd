"""Resampling along an axis: nearest, linear, cubic. Scale = input step per output step, a fraction p/q.

    half-pixel:    source = (o + 1/2) * p/q - 1/2          nearest: floor(o * p/q)
    align corners: source = o * (in - 1) / (out - 1)       exact:   floor((o + 1/2) * p/q)

Linear reads floor(source) and the next index, cubic one more on each side; indices outside are the edge's.
Frameworks compute the source in floating point; unless the scale is a power of two the reach is widened by one
index each side, so that a source rounded the other way is still covered.
"""

from __future__ import annotations

from fractions import Fraction

from ranger_nn.core.reach import Border, Link, Reach

TAPS = {"nearest": (0, 0), "nearest-exact": (0, 0), "linear": (0, 1), "cubic": (-1, 2)}


def is_dyadic(scale: Fraction) -> bool:
    """True where floating point computes the source coordinate without rounding."""
    return all(n & (n - 1) == 0 for n in (scale.numerator, scale.denominator))


def resample_reach(mode: str, size: int, out: int, scale: Fraction, align_corners: bool) -> Reach:
    """Four integers for `mode` (a key of TAPS) from `size` input to `out` output indices."""
    before, after = TAPS[mode]
    if align_corners:
        num, offset, den = (size - 1, 0, out - 1) if out > 1 else (0, 0, 1)
        slack = 1
    else:
        p, q = scale.numerator, scale.denominator
        shift = {"nearest": 0, "nearest-exact": p}.get(mode, p - q)
        num, offset, den = 2 * p, shift, 2 * q
        slack = 0 if is_dyadic(scale) else 1
    return Reach(num, offset + (before - slack) * den, offset + (after + slack) * den, den)


def resample_link(dim: int, mode: str, size: int, out: int, scale: Fraction, align_corners: bool) -> Link:
    """Link of one resampled dimension; the edge is repeated outside."""
    return Link(dim, resample_reach(mode, size, out, scale, align_corners), Border.REPLICATE)
