import pytest
import torch


pytest.register_assert_rewrite("helpers", "processes.launch")

# Models here are far too small to gain from threads.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def fresh():
    from helpers.fresh import FreshProcesses

    with FreshProcesses() as processes:
        yield processes
