"""Runs all checks on all families, and writes docs/models.md."""

import sys

import pytest

from . import FAMILIES
from .checks import Tuned, measure_roads
from .document import PAGE, has_roads, render


OF_PAGE = "roads or page_is_up_to_date"
status = pytest.main(["-q", "-k", f"not ({OF_PAGE})", "tests/test_families.py"])
if status == 0:
    roads = {family.name: measure_roads(Tuned(family)) for family in FAMILIES if family.runs and has_roads(family)}
    PAGE.write_text(render(FAMILIES, roads), encoding="utf-8")
sys.exit(status)
