"""Importing the package registers the method, once, and does nothing else."""

import importlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import peft_m2pt


ROOT = Path(peft_m2pt.__file__).parent.parent


STRICT = r"""
import warnings
warnings.filterwarnings("error", module=r"peft_m2pt\Z")
"""


@pytest.fixture
def run(fresh):
    def run(code):
        """Runs code in a fresh process that finds the package, and returns what it prints."""
        result = fresh.code(STRICT + textwrap.dedent(code))
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    return run


def test_member():
    member = PeftType.M2PT
    assert member is PeftType("M2PT") is PeftType["M2PT"]
    assert member == "M2PT" and member.value == member.name == "M2PT"
    assert isinstance(member, PeftType) and isinstance(member, str)
    assert list(PeftType).count(member) == 1
    assert pickle.loads(pickle.dumps(member)) is member
    assert json.dumps(member) == '"M2PT"'
    assert {member: 1}["M2PT"] == 1


def test_mappings():
    assert PEFT_TYPE_TO_CONFIG_MAPPING["M2PT"] is peft_m2pt.M2PTConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["M2PT"] is peft_m2pt.M2PTModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING["M2PT"] == peft_m2pt.M2PTModel.prefix == "m2pt_"


def test_reload_is_harmless():
    importlib.reload(peft_m2pt)
    test_member()
    test_mappings()


def test_import_from_scratch_is_harmless(run):
    output = run(
        """
        import sys
        import peft_m2pt

        first = peft_m2pt.M2PTConfig
        for name in [name for name in sys.modules if name.partition(".")[0] == "peft_m2pt"]:
            del sys.modules[name]
        import peft_m2pt
        from peft import PeftType
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        assert peft_m2pt.M2PTConfig is not first
        assert PEFT_TYPE_TO_CONFIG_MAPPING["M2PT"] is peft_m2pt.M2PTConfig
        print(list(PeftType).count("M2PT"))
        """
    )
    assert output == "1"


@pytest.mark.parametrize(
    "clash, message",
    [
        ("PEFT_TYPE_TO_CONFIG_MAPPING['M2PT'] = LoraConfig", "already has a method called 'm2pt': peft.tuners.lora"),
        ("PEFT_TYPE_TO_PREFIX_MAPPING['LORA'] = 'm2pt_'", "already uses the prefix 'm2pt_'"),
    ],
)
def test_clashes_are_refused(clash, message, run):
    output = run(
        f"""
        from peft import LoraConfig
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING

        {clash}
        try:
            import peft_m2pt
        except RuntimeError as error:
            print(error)
        """
    )
    assert message in output
    assert "Import only one of the two packages" in output


def test_import_is_light(run):
    output = run(
        """
        import sys
        import time

        import peft
        import torch

        before = set(sys.modules)
        start = time.perf_counter()
        import peft_m2pt

        assert not torch.cuda.is_initialized()
        print(sorted({name.partition(".")[0] for name in set(sys.modules) - before} - {"peft_m2pt"}))
        """
    )
    assert output == "[]"


def other_pythons():
    """Interpreters of other versions, on the path or installed by pyenv. They need no packages."""
    for version in ("3.12", "3.13"):
        candidates = [
            shutil.which(f"python{version}"),
            *sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python")),
        ]
        for python in filter(None, candidates):
            if subprocess.run([python, "--version"], capture_output=True).returncode == 0:
                yield pytest.param(str(python), id=version)
                break


@pytest.mark.parametrize("python", [pytest.param(sys.executable, id="this version"), *other_pythons()])
def test_registration_on_other_versions_of_python(tmp_path, python):
    # A stand-in for PEFT with all that the registration touches, since other interpreters have no torch.
    package = tmp_path / "peft"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "mapping.py").write_text(
        "PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING = {}, {}, {}\n"
    )
    (package / "utils.py").write_text(
        textwrap.dedent(
            """
            import enum

            from . import mapping


            class PeftType(str, enum.Enum):
                LORA = "LORA"


            def register_peft_method(*, name, config_cls, model_cls, prefix):
                peft_type = getattr(PeftType, name.upper())
                assert peft_type not in mapping.PEFT_TYPE_TO_CONFIG_MAPPING
                mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_cls
                mapping.PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = model_cls
                mapping.PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = prefix
            """
        )
    )
    code = f"""
        import copy, importlib.util, json, pickle
        from peft.utils import PeftType

        spec = importlib.util.spec_from_file_location("register", {str(ROOT / "peft_m2pt" / "register.py")!r})
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


        class Config: ...
        class Model: ...


        for _ in range(2):
            module.register(Config, Model)
        member = PeftType.M2PT
        assert member is PeftType("M2PT") is PeftType["M2PT"] is copy.deepcopy(member)
        assert pickle.loads(pickle.dumps(member)) is member
        assert list(PeftType) == ["LORA", "M2PT"] and "M2PT" in PeftType.__members__
        assert repr(member) == "<PeftType.M2PT: 'M2PT'>" and member.value.lower() == "m2pt"
        assert json.dumps({{member: member}}) == json.dumps({{"M2PT": "M2PT"}})
        print("registered")
    """
    output = subprocess.run(
        [python, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert output.strip() == "registered"
