"""The command `peft-m2pt env`."""

import platform

import peft
import pytest
import torch
import transformers
from helpers.models import adapt, make_llava
from packaging.version import Version

import peft_m2pt
from peft_m2pt.tested import TESTED
from peft_m2pt.tools.cli import main
from peft_m2pt.tools.environment import asks_for_newer_peft, describe_environment


@pytest.fixture
def install(monkeypatch):
    """Plays that versions of packages are installed, or that they are not (`None`)."""

    def install(versions):
        def version(package, of=peft_m2pt.tested.version):
            if versions.get(package, "") is None:
                raise peft_m2pt.tested.PackageNotFoundError(package)
            return versions.get(package) or of(package)

        monkeypatch.setattr("peft_m2pt.tested.version", version)

    return install


def rows(text):
    return {name: value for name, _, value in (line.partition("  ") for line in text.splitlines())}


def test_versions(capsys):
    assert main(["env"]) == 0
    found = {name: value.split() for name, value in rows(capsys.readouterr().out).items()}
    assert found["peft-m2pt"] == [peft_m2pt.__version__]
    assert found["Python"] == [platform.python_version()]
    assert found["platform"] == [platform.platform()]
    for module in (torch, transformers, peft):
        # Only one of the two may say what torch is built for.
        assert Version(found[module.__name__][0]).public == Version(module.__version__).public
    assert {"accelerate", "datasets", "huggingface-hub", "tokenizers", "safetensors"} <= set(found)


def test_the_tested_range(install):
    install({"torch": "2.5.0+cu124", "transformers": "99.0.0", "peft": "unknown", "accelerate": None})
    text = describe_environment()
    assert f"\ntorch            2.5.0+cu124    older than tested ({TESTED['torch']})\n" in text
    assert f"\ntransformers     99.0.0         newer than tested ({TESTED['transformers']})\n" in text
    assert f"\npeft             unknown        not comparable with tested versions ({TESTED['peft']})\n" in text
    assert f"\naccelerate       not installed  not comparable with tested versions ({TESTED['accelerate']})\n" in text
    install({package: versions.newest for package, versions in TESTED.items()})
    assert f"\ntransformers     {TESTED['transformers'].newest}" in describe_environment()
    assert describe_environment().count("  tested (") == len(TESTED)


def test_optional_packages(install):
    install({"trl": "1.2.3", "flash-attn": "4.5.6", "deepspeed": None})
    found = rows(describe_environment())
    assert found["trl"].strip() == "1.2.3" and found["flash-attn"].strip() == "4.5.6"
    assert "deepspeed" not in found


@pytest.mark.parametrize("available", [False, True])
def test_accelerators(monkeypatch, available):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: available)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    expected = "2 x cuda (torch is built for cuda 13.0)" if available else "none (torch is built for cuda 13.0)"
    assert rows(describe_environment())["accelerator"].strip() == expected


class TestAttention:
    def test_of_a_config(self, tmp_path, capsys):
        make_llava().config.save_pretrained(tmp_path)
        assert main(["env", str(tmp_path)]) == 0
        assert capsys.readouterr().out.splitlines()[-4:] == [
            "attention of LlavaForConditionalGeneration",
            "  the model itself      sdpa",
            "  model.vision_tower    sdpa",
            "  model.language_model  sdpa",
        ]

    def test_of_a_model(self):
        model = make_llava()
        model.set_attn_implementation({"vision_config": "eager", "text_config": "flex_attention"})
        assert describe_environment(model).splitlines()[-2:] == [
            "  model.vision_tower    eager",
            "  model.language_model  flex_attention",
        ]

    def test_of_a_tuned_model(self):
        lines = describe_environment(adapt(make_llava(attn="eager"))).splitlines()
        assert lines[-1].split() == ["base_model.model.model.language_model", "eager"]

    def test_no_config(self, tmp_path, capsys):
        assert main(["env", str(tmp_path)]) == 1
        assert "config.json" in capsys.readouterr().err


class TestNewerPeft:
    """What transformers asks for in `add_adapter` and `load_adapter`."""

    def test_too_old(self, install, monkeypatch):
        monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.22.0")
        install({"transformers": "5.24.0", "peft": "0.21.2"})
        line = asks_for_newer_peft()
        assert "transformers 5.24.0 requires PEFT 0.22.0 or later" in line and "PEFT 0.21.2 is installed" in line
        assert "`get_peft_model` and `PeftModel.from_pretrained` are unaffected" in line
        assert line in describe_environment().splitlines()

    def test_new_enough(self, install, monkeypatch):
        monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.22.0")
        install({"peft": "0.22.0"})
        assert asks_for_newer_peft() is None
        assert "add_adapter" not in describe_environment()
