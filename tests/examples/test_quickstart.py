"""The quickstart: what it prints, and what it does when something goes wrong. CI runs it in full."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def vqa(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import vqa

    return vqa


def test_wrong_paths(tmp_path, fresh):
    (tmp_path / "file").touch()
    code = f"""
import runpy, sys
sys.path.insert(0, {str(EXAMPLES)!r})
runpy.run_module("quickstart", run_name="__main__")
"""
    for arguments, message in (
        (["--base", "nowhere", "--output", tmp_path / "output"], "error: nowhere is not the folder of a model"),
        (["--output", tmp_path / "file"], "error: [Errno 17] File exists"),
    ):
        process = fresh.code(code, *arguments, folder=tmp_path)
        assert process.returncode == 1
        assert process.stderr.splitlines()[-1].startswith(message)
        assert not (tmp_path / "output" / "adapter").exists()


class Saved:
    def __init__(self, content, error=None):
        self.content, self.error = content, error

    def save_pretrained(self, folder):
        folder.mkdir()
        (folder / "weights").write_text(self.content)
        if self.error is not None:
            raise self.error


def test_saving_replaces_a_folder(vqa, tmp_path):
    for content in ("first", "second"):
        vqa.save(tmp_path / "adapter", Saved(content))
        assert (tmp_path / "adapter" / "weights").read_text() == content
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("other"), KeyboardInterrupt()])
def test_a_folder_appears_only_when_it_is_complete(vqa, tmp_path, error):
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OSError
    with pytest.raises(expected):
        vqa.save(tmp_path / "adapter", Saved("half", error))
    assert not list(tmp_path.iterdir())
    vqa.save(tmp_path / "adapter", Saved("first"))
    with pytest.raises(expected):
        vqa.save(tmp_path / "adapter", Saved("half", error))
    assert (tmp_path / "adapter" / "weights").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


RUN = """
import sys
sys.modules.update(dict.fromkeys(["bitsandbytes", "torchao", "trl"]))  # are not in its own environment
import quickstart
recipe = quickstart.tiny_llava.Recipe(num_images=64, vision_steps=1, steps=1, width=32)
quickstart.SHORT = quickstart.Plan(recipe, tuning_steps=1, num_test_images=10)
quickstart.main()
"""
BAR = re.compile(r"(Pretraining: \w+|Answering (before|after) tuning|Tuning with M2PT) *: +\d+%\|.*")


def test_it_prints_its_own_words_alone(tmp_path):
    process = subprocess.run(
        [sys.executable, "-c", RUN, "--short", "--cache-dir", tmp_path / "cache", "--output", tmp_path / "output"],
        cwd=EXAMPLES,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    lines = [line for line in re.split(r"[\r\n]+", process.stderr) if line.strip()]
    assert lines and not [line for line in lines if not BAR.fullmatch(line)]
    first, *_, last = process.stdout.splitlines()
    assert first.startswith("Answering again") and last == f"See {tmp_path / 'output' / 'quickstart.png'}."
