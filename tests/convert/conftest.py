"""An official checkpoint."""

import pytest
from helpers.official_checkpoints import Folders
from helpers.reference import load_case


@pytest.fixture
def folders(tmp_path):
    return Folders(tmp_path, load_case("v4_t3"))
