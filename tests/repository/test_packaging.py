"""What is released: the source distribution, and the wheel in an environment of its own."""

import ast
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import peft_m2pt


ROOT = Path(__file__).parents[2]


def build_wheel(source, folder):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, source],
        check=True,
    )
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build_wheel(ROOT, tmp_path_factory.mktemp("wheel"))


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


def test_source_distribution(wheel, tmp_path):
    """It holds what the tests read, and the wheel that is made from it is the one that is made from the repository."""
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", tmp_path], cwd=ROOT, check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    needed = {"Makefile", "pyproject.toml", "CITATION.cff", "LICENSE", ".ci/run"}
    for folder in (".", "docs", "examples", "benchmarks", ".github/workflows"):
        for pattern in ("*.py", "*.md", "*.yml", "constraints*.txt"):
            needed |= {str(path.relative_to(ROOT)) for path in (ROOT / folder).glob(pattern)}
    for folder in ("peft_m2pt", "tests"):
        needed |= {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py")}
    assert needed <= names
    from_archive = build_wheel(archive, tmp_path)
    assert from_archive.name == wheel.name
    assert sorted(zipfile.ZipFile(from_archive).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


def test_the_version_to_cite():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == peft_m2pt.__version__


def test_entry_points():
    """Plugins of other programs, which are not installed here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"].keys() == {"lmms_eval.models", "vllm.general_plugins"}
    for points in project["entry-points"].values():
        for point in points.values():
            module, _, function = point.partition(":")
            path = ROOT / module.replace(".", "/")
            source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            assert function in {getattr(node, "name", None) for node in ast.parse(source.read_text()).body}


def test_other_programs_are_not_imported():
    program = """
import sys, peft_m2pt
assert not {"axolotl", "lmms_eval", "swift", "vllm"} & {name.partition(".")[0] for name in sys.modules}
"""
    subprocess.run([sys.executable, "-c", program], check=True)
