"""Data sets that are not ours to ship: found beside the checkout, or where `MODAL_EVAL_TEST_DATA` says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("MODAL_EVAL_TEST_DATA") or ROOT.parent / "shared" / "data")


def data_file(name: str) -> Path:
    """The file `name` of the test data; skips the test where it is absent."""
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"no test data: {name} is not in {DATA}; set MODAL_EVAL_TEST_DATA")
    return path
