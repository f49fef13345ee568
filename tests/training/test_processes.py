"""Training in two processes gives what one process gives on the same batches."""

import pytest
from processes.launch import check, train_alone


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return train_alone(tmp_path_factory.mktemp("alone"), "states")


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes(engine, expected, tmp_path):
    check(engine, expected, tmp_path)
    if engine == "fsdp2":
        weights = (tmp_path / folder / "adapter_model.safetensors" for folder in ("adapter", "trained"))
        assert len({path.read_bytes() for path in weights}) == 1
