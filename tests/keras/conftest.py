"""Keras reads its back end once, when it is imported; tests print which one they run on."""

from __future__ import annotations

import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def pytest_report_header() -> str:
    """The back end, on top of the report."""
    return f"keras back end: {os.environ['KERAS_BACKEND']}"
