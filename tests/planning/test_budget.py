"""Amounts of memory are read exactly, and what is not an amount is refused with a way out."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranger_nn.errors import BudgetError, RangerError, UnitError
from ranger_nn.planning.budget import format_bytes, parse_memory


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (1, 1),
        (512_000_000, 512_000_000),
        (np.int64(4096), 4096),
        ("512", 512),
        ("512B", 512),
        ("64kB", 64_000),
        ("64 KB", 64_000),
        ("512MB", 512 * 10**6),
        ("512mb", 512 * 10**6),
        ("2GiB", 2 * 2**30),
        ("2gib", 2 * 2**30),
        ("2 GiB", 2 * 2**30),
        ("  1.5 GB ", 1_500_000_000),
        (".5MiB", 2**19),
        ("1.GB", 10**9),
        ("1TB", 10**12),
        ("1TiB", 2**40),
        ("2G", 2 * 10**9),
        ("1_000kB", 10**6),
        ("1e3MB", 10**9),
        ("0.1GB", 10**8),
        ("1.9B", 1),
    ],
)
def test_amounts(written, expected):
    count = parse_memory(written)
    assert count == expected
    assert type(count) is int


def test_none_is_no_limit():
    assert parse_memory(None) is None


@pytest.mark.parametrize(
    "written",
    [0, -1, "0", "0MB", "-5MB", "0.5B", "", "MB", "many", "nan", "inf", "1,5GB", "1 2MB", "--1", "1e999MB"],
)
def test_not_a_positive_amount(written):
    with pytest.raises(BudgetError, match="positive amount of bytes") as caught:
        parse_memory(written)
    assert repr(written) in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("written", [True, False, math.nan, math.inf, 1.5, 2e9, [1], b"1MB", 1j])
def test_wrong_type(written):
    with pytest.raises(BudgetError, match=type(written).__name__):
        parse_memory(written)


def test_a_float_is_told_its_whole_bytes():
    with pytest.raises(BudgetError, match="2000000000"):
        parse_memory(2e9)


@pytest.mark.parametrize("written", ["5 parsecs", "1XB", "2Gib/s", "3 bits"])
def test_unknown_unit_names_the_known_ones(written):
    with pytest.raises((UnitError, BudgetError), match=r"MiB|number followed by a unit"):
        parse_memory(written)


def test_unknown_unit_has_its_own_class():
    with pytest.raises(UnitError, match="'XB' is not known"):
        parse_memory("1XB")


def test_budget_error_survives_pickling():
    error = BudgetError("too small", allowed=3, least=7, binding="conv1")
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, RangerError)
    assert (str(copy), copy.allowed, copy.least, copy.binding) == ("too small", 3, 7, "conv1")


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (1500, "1.50 kB"),
        (9_994, "9.99 kB"),
        (9_996, "10.0 kB"),
        (99_960, "100 kB"),
        (512_000_000, "512 MB"),
        (999_600, "1.00 MB"),
        (2 * 2**30, "2.15 GB"),
        (123 * 10**15, "123000 TB"),
        (-1500, "-1.50 kB"),
    ],
)
def test_format(count, expected):
    assert format_bytes(count) == expected


@given(st.integers(min_value=1, max_value=2**60))
def test_whole_bytes_pass_through(count):
    assert parse_memory(count) == parse_memory(str(count)) == parse_memory(f"{count} B") == count


@given(
    st.integers(min_value=1, max_value=10**6),
    st.sampled_from([("kB", 10**3), ("MB", 10**6), ("GB", 10**9), ("KiB", 2**10), ("MiB", 2**20)]),
    st.sampled_from([str.lower, str.upper, str]),
    st.sampled_from(["", " ", "  "]),
)
def test_unit_multiplies(number, unit, case, space):
    name, factor = unit
    assert parse_memory(f"{number}{space}{case(name)}") == number * factor


@given(st.integers(min_value=1, max_value=10**15))
def test_what_is_printed_reads_back_within_its_digits(count):
    printed = parse_memory(format_bytes(count))
    assert abs(printed - count) <= max(0.005 * count, 0)


@given(st.text(max_size=12))
def test_any_text_is_an_amount_or_a_budget_error(text):
    try:
        count = parse_memory(text)
    except BudgetError:
        return
    assert count >= 1
