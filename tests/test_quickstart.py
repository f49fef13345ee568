"""The quickstart when something goes wrong. What it does when all goes well is a job of its own in CI."""

import subprocess
import sys
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def vqa(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import vqa

    return vqa


def test_wrong_paths(tmp_path):
    (tmp_path / "file").touch()
    for arguments, message in (
        (["--base", "nowhere", "--output", tmp_path / "output"], "error: nowhere is not the folder of a model"),
        (["--output", tmp_path / "file"], "error: [Errno 17] File exists"),
    ):
        process = subprocess.run(
            [sys.executable, EXAMPLES / "quickstart.py", *arguments], cwd=tmp_path, capture_output=True, text=True
        )
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
