"""The versions that are tested: where they are written, and what errors say of later ones."""

import pickle
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers.models import make_llava
from packaging.requirements import Requirement
from packaging.version import Version
from peft import get_peft_model

import peft_m2pt
from peft_m2pt import AdapterFileError, ConversionError, M2PTConfig, UnsupportedModelError
from peft_m2pt.tested import TESTED, newer_than_tested, place


ROOT = Path(__file__).parent.parent
NEWEST = {package: versions.newest for package, versions in TESTED.items()}
LOWEST = {package: versions.lowest for package, versions in TESTED.items()}


def read_constraints(name):
    lines = (ROOT / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def minors(package):
    """As the README writes them: `5.8 to 5.24`, or `0.21`."""
    lowest, newest = (".".join(version.split(".")[:2]) for version in TESTED[package])
    return lowest if lowest == newest else f"{lowest} to {newest}"


@pytest.fixture
def install(monkeypatch):
    """Plays that versions of packages are installed, and the newest tested ones of all others."""

    def install(**versions):
        versions = {**NEWEST, **versions}
        monkeypatch.setattr("peft_m2pt.tested.version", lambda package: versions[package])

    return install


class TestOneTable:
    @pytest.mark.parametrize("package", TESTED)
    def test_constraints(self, package):
        assert read_constraints("constraints-lowest.txt")[package] == TESTED[package].lowest
        assert read_constraints("constraints.txt")[package] == TESTED[package].newest

    @pytest.mark.parametrize("name", ["middle", "newest", "main"])
    def test_other_constraints(self, name):
        constraints = read_constraints(f"constraints-{name}.txt")
        assert constraints.pop("torch") == TESTED["torch"].newest
        for package, version in constraints.items():
            lowest, newest = map(Version, TESTED[package])
            assert lowest < Version(version) < newest

    def test_lower_bounds(self):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        lowest = read_constraints("constraints-lowest.txt")
        for requirement in map(Requirement, project["dependencies"]):
            (bound,) = [part.version for part in requirement.specifier if part.operator == ">="]
            assert Version(bound) == Version(lowest[requirement.name]), requirement
        assert set(TESTED) <= {Requirement(text).name for text in project["dependencies"]}

    def test_readme(self):
        text = " ".join((ROOT / "README.md").read_text().split())
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        pythons = [name.rpartition(" ")[2] for name in project["classifiers"] if re.search(r":: \d+\.\d+$", name)]
        assert (
            f"Python {pythons[0]} to {pythons[-1]}, transformers {minors('transformers')}, PEFT {minors('peft')}, "
            f"torch {minors('torch')}, accelerate {minors('accelerate')}." in text
        )
        assert project["requires-python"] == f">={pythons[0]}"

    def test_docs(self):
        text = (ROOT / "docs" / "faq.md").read_text()
        rows = re.findall(r"^\| (\S+) \| (\S+) \| (\S+) \|$", text, re.MULTILINE)
        assert {package: tuple(versions) for package, *versions in rows[1:]} == TESTED


@pytest.mark.parametrize(
    "version, expected",
    [
        ("2.13.0", "within"),
        ("2.13.0+cpu", "within"),
        ("2.6.0+cu124", "within"),
        ("2.13.0a0+nv25.1", "within"),
        ("2.13.1", "newer"),
        ("2.13.0.post1", "newer"),
        ("2.14.0.dev20261101+cpu", "newer"),
        ("2.5.1", "older"),
        ("unknown", None),
    ],
)
def test_place(install, version, expected):
    install(torch=version)
    assert place("torch") == expected


def test_packages_that_are_not_installed(monkeypatch):
    monkeypatch.setitem(TESTED, "no-such-package", TESTED["torch"])
    assert place("no-such-package") is None


class TestErrors:
    @pytest.mark.parametrize("versions", [NEWEST, LOWEST, {"torch": "2.13.0+cpu"}], ids=str)
    @pytest.mark.parametrize("error", [UnsupportedModelError, ConversionError, AdapterFileError])
    def test_tested_versions(self, install, error, versions):
        install(**versions)
        assert newer_than_tested() is None
        assert str(error("It is so.")) == "It is so."

    @pytest.mark.parametrize("error", [UnsupportedModelError, ConversionError, AdapterFileError])
    def test_a_newer_version(self, install, error):
        install(transformers="99.0.0.dev0")
        newest = TESTED["transformers"].newest
        expected = (
            "It is so.\n"
            f"transformers 99.0.0.dev0 is newer than the newest version that peft-m2pt {peft_m2pt.__version__} was "
            f'tested with ({newest}); if that is why, try a newer peft-m2pt, or: pip install "transformers<={newest}"'
        )
        assert str(error("It is so.")) == expected
        assert str(pickle.loads(pickle.dumps(error("It is so.")))) == expected
        assert error("It is so.").reason == "It is so."

    def test_several_newer_versions(self, install):
        install(transformers="99.0.0", peft="99.1.0", torch="99.2.0+cpu")
        line = newer_than_tested()
        assert line.startswith(
            "torch 99.2.0+cpu, transformers 99.0.0 and peft 99.1.0 are newer than the newest versions"
        )
        assert f"({NEWEST['torch']}, {NEWEST['transformers']} and {NEWEST['peft']})" in line
        assert line.endswith(f'"transformers<={NEWEST["transformers"]}" "peft<={NEWEST["peft"]}"')

    def test_errors_that_quote_errors(self, install):
        install(peft="99.1.0")
        error = ConversionError(f"It failed: {UnsupportedModelError('It is so.')}")
        assert str(error) == f"It failed: It is so.\n{newer_than_tested()}"

    def test_models_that_are_refused(self, install):
        install(transformers="99.0.0")
        with pytest.raises(
            UnsupportedModelError, match=r"(?s)model\.nowhere.*\ntransformers 99\.0\.0 is newer"
        ) as error:
            get_peft_model(make_llava(), M2PTConfig(vision_encoder="model.nowhere"))
        assert str(error.value).splitlines()[-1] == newer_than_tested()


def test_errors_import_nothing_heavy():
    """Neither torch nor anything built on it, apart from what the package itself imports."""
    code = (
        "import sys, types\n"
        "package = types.ModuleType('peft_m2pt')\n"
        f"package.__path__ = [{str(ROOT / 'peft_m2pt')!r}]\n"
        "sys.modules['peft_m2pt'] = package\n"
        "import peft_m2pt.errors\n"
        "print(sorted({'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
