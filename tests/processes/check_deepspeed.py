"""The same with DeepSpeed, for which `make test-deepspeed` makes an environment of its own."""

import pytest

from .launch import check, train_alone


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return train_alone(tmp_path_factory.mktemp("alone"), "vocabulary")


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_two_processes(engine, expected, tmp_path):
    check(engine, expected, tmp_path)
