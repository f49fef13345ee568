"""Checkpoint folders that nobody vouches for: what is wrong with their files is said, and nothing in them runs."""

import os
import pickle

import pytest
import torch
from helpers.official_checkpoints import INDEX, Folders, write_json
from helpers.reference import load_case


@pytest.fixture
def folders(tmp_path):
    return Folders(tmp_path, load_case("v4_t3"))


# What is refused


class Malicious:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_malicious_files_are_refused(folders):
    trap = folders.root.parent / f"{folders.root.name}-trap"
    file = folders.original / "pytorch_model.bin"
    torch.save({**folders.weights, "model.norm.weight": Malicious(trap)}, file)
    asked_for = f"{os.mkdir.__module__}.mkdir"
    refused = (
        f"{file} is refused: it refers to '{asked_for}' where only tensors are expected. No code in it was executed."
    )
    folders.refuse(refused)
    file.write_bytes(pickle.dumps(Malicious(trap), protocol=2))
    folders.refuse(refused)
    assert not trap.exists()
    pickle.loads(file.read_bytes())
    assert trap.exists(), "this file would not have done any harm"


@pytest.mark.parametrize(
    "content", [[torch.ones(1)], {"a": 1}, {1: torch.ones(1)}, {"a": torch.ones(2, 2).to_sparse()}]
)
def test_other_things_than_tensors_are_refused(folders, content):
    torch.save(content, folders.original / "pytorch_model.bin")
    folders.refuse(
        f"{folders.original / 'pytorch_model.bin'} is refused: it holds something other than named tensors."
    )


@pytest.mark.parametrize("layout", ["bin", "safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_truncated_files_are_refused(tmp_path, layout, kept):
    folders = Folders(tmp_path, load_case("v4_t3"), layout)
    (file,) = folders.language_model.glob("*model*." + layout)
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content))])
    folders.refuse(str(file))


def test_a_missing_shard_is_refused(tmp_path):
    folders = Folders(tmp_path, load_case("v4_t3"), "sharded bin")
    (folders.original / "pytorch_model-00002-of-00003.bin").unlink()
    folders.refuse(
        f"{folders.original / INDEX} names the shard 'pytorch_model-00002-of-00003.bin', which does not exist"
    )


@pytest.mark.parametrize("where", ["../llama/pytorch_model.bin", "{root}/llama/pytorch_model.bin", "", "..", 3, None])
def test_an_index_that_points_elsewhere_is_refused(folders, where):
    where = where.format(root=folders.root) if isinstance(where, str) else where
    (folders.original / "pytorch_model.bin").unlink()
    write_json(folders.original / INDEX, {"weight_map": {"lm_head.weight": where}})
    folders.refuse(str(folders.original / INDEX), repr(where))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', "\xff"])
def test_a_broken_index_is_refused(folders, content):
    (folders.original / "pytorch_model.bin").unlink()
    (folders.original / INDEX).write_text(content, encoding="latin-1")
    folders.refuse(str(folders.original / INDEX))


def test_contradictory_shards_are_refused(tmp_path):
    folders = Folders(tmp_path, load_case("v4_t3"), "sharded bin")
    first, second = (folders.original / f"pytorch_model-0000{i}-of-00003.bin" for i in (1, 2))
    shard = torch.load(second)
    name = next(iter(shard))
    torch.save({**torch.load(first), name: shard[name]}, first)
    folders.refuse(f"'{name}' is in both {first} and {second}.")
    del shard[name]
    torch.save(shard, second)
    folders.refuse(f"{second} lacks '{name}', which is in it according to the index.")


def test_folders_without_weights_are_refused(folders):
    (folders.original / "pytorch_model.bin").unlink()
    folders.refuse(f"{folders.original} has no weights. Expected one of the files model.safetensors, ")
