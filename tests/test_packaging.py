"""The wheel, in an environment of its own."""

import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, ROOT],
        check=True,
    )
    return next(folder.glob("*.whl"))


def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "peft_m2pt/py.typed" in names
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"peft_m2pt"}
    metadata = next(name for name in names if name.endswith("METADATA"))
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    assert "License-Expression: Apache-2.0" in text
    assert "Requires-Python: >=3.11" in text
    for package in ("torch", "transformers", "peft", "accelerate", "datasets", "huggingface-hub"):
        assert re.search(rf"^Requires-Dist: {package}\S*>=", text, re.MULTILINE), package


def test_installed_wheel(wheel, tmp_path):
    venv.create(tmp_path, with_pip=False)
    python = tmp_path / "bin" / "python"
    site_packages = next((tmp_path / "lib").glob("python*/site-packages"))
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel], check=True
    )
    # The dependencies are those of this environment: what is in its folder, without what it links to.
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    code = "import peft, peft_m2pt; print(peft_m2pt.__file__); print(peft.PeftType.M2PT)"
    output = subprocess.run(
        [python, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert output.splitlines()[0].startswith(str(site_packages))
    assert "M2PT" in output.splitlines()[1]
