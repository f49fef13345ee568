"""A base model, an adapter, and where their bundle goes."""

import pytest
from helpers.bundles import save_adapter, save_base


@pytest.fixture
def base(tmp_path):
    return save_base(tmp_path / "base")


@pytest.fixture
def adapter(base, tmp_path):
    return save_adapter(base, tmp_path / "adapter")


@pytest.fixture
def output(tmp_path):
    return tmp_path / "bundle"
