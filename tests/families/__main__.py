"""Runs all checks on all families, and writes docs/models.md."""

import sys

import pytest

from . import FAMILIES
from .document import PAGE, render


status = pytest.main(["-q", "--deselect", "tests/test_families.py::test_page_is_up_to_date", "tests/test_families.py"])
if status == 0:
    PAGE.write_text(render(FAMILIES), encoding="utf-8")
sys.exit(status)
