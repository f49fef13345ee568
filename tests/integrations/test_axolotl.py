"""The plugin for axolotl with a stand-in for its classes. tests/processes/check_axolotl.py runs axolotl itself."""

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch
from helpers.models import make_inputs, make_llava, trained_by, without_labels
from peft import PeftModel

from peft_m2pt import M2PTConfig


pydantic = pytest.importorskip("pydantic")


@dataclass(frozen=True)
class AdapterCapabilities:
    name: str
    lora_like: bool = False
    relora: bool = False


@pytest.fixture
def plugin(monkeypatch):
    """The module of the plugin, with as much of axolotl 0.21.0 as it imports."""
    base = ModuleType("axolotl.integrations.base")
    base.AdapterCapabilities, base.BasePlugin = AdapterCapabilities, type("BasePlugin", (), {})
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    monkeypatch.delitem(sys.modules, "peft_m2pt.integrations.axolotl", raising=False)
    import peft_m2pt.integrations.axolotl as plugin

    return plugin


OPTIONS = {"adapter": "m2pt", "m2pt": {"num_visual_tokens": 4, "num_textual_tokens": 3}}


class Options(SimpleNamespace):
    """As `DictDefault` of axolotl: what is not there is None."""

    def __getattr__(self, name):
        return None

    def get(self, name):
        return getattr(self, name)


def load(plugin, model, inference=False, config_only=False, **options):
    options = Options(**{**OPTIONS, **options})
    return plugin.M2PTPlugin().load_adapter(model, options, inference=inference, config_only=config_only)


def test_new_and_saved_adapters(plugin, tmp_path):
    model, config = load(plugin, make_llava(), lora_modules_to_save=["lm_head"])
    assert config is model.peft_config["default"]
    assert (config.num_visual_tokens, config.num_textual_tokens, config.modules_to_save) == (4, 3, ["lm_head"])
    assert all(parameter.requires_grad for parameter in trained_by(model).values())
    model.save_pretrained(tmp_path)
    inputs = without_labels(make_inputs())
    for inference in (False, True):
        loaded, _ = load(plugin, make_llava(), inference, lora_model_dir=str(tmp_path))
        assert any(parameter.requires_grad for parameter in loaded.parameters()) != inference
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)


def test_precision(plugin):
    for autocast, dtype in ((None, torch.float32), (False, torch.bfloat16)):
        model, _ = load(plugin, make_llava().bfloat16(), peft_autocast_adapter_dtype=autocast)
        assert {parameter.dtype for parameter in trained_by(model).values()} == {dtype}


def test_other_adapters_are_left_to_axolotl(plugin):
    assert load(plugin, make_llava(), adapter="lora", m2pt=None) is None
    assert plugin.M2PTPlugin().get_adapter_capabilities() == [AdapterCapabilities("m2pt")]


def test_config_for_preference_trainers(plugin):
    model, config = load(plugin, None, config_only=True)
    assert model is None and isinstance(config, M2PTConfig) and config.num_visual_tokens == 4
    with pytest.raises(
        ValueError, match="With rl: dpo, axolotl makes a new adapter and would ignore lora_model_dir='x'. Train with"
    ):
        load(plugin, None, config_only=True, rl="dpo", lora_model_dir="x")


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"adapter": "lora"}, ValueError, "m2pt has fields of M2PTConfig, but adapter is 'lora'. Set adapter: m2pt"),
        ({"load_in_4bit": True}, ValueError, "load_in_4bit: true has no effect with adapter: m2pt.*Leave it out"),
        ({"load_in_8bit": True}, ValueError, "load_in_8bit: true has no effect"),
        ({"m2pt": {"num_visual_token": 3}}, TypeError, "unexpected keyword argument 'num_visual_token'"),
        ({"m2pt": {"num_visual_tokens": -1}}, ValueError, "num_visual_tokens"),
        (
            {"m2pt": {"modules_to_save": ["lm_head"]}, "lora_modules_to_save": ["embed_tokens"]},
            TypeError,
            "multiple values for keyword argument 'modules_to_save'",
        ),
    ],
)
def test_mistakes_in_the_options(plugin, options, error, message):
    with pytest.raises(error, match=message):
        plugin.M2PTArgs(**{**OPTIONS, **options})


def test_options(plugin):
    module, _, name = plugin.M2PTPlugin().get_input_args().rpartition(".")
    arguments = getattr(sys.modules[module], name)
    assert arguments(**OPTIONS).m2pt == OPTIONS["m2pt"]
    assert arguments(adapter="m2pt").m2pt is None
    assert arguments(adapter="lora").m2pt is None


def test_config_of_the_base_beside_an_adapter(plugin, tmp_path):
    """Left there, `PeftModel` loads the folder all the same; removed, all of transformers does."""
    base = make_llava()
    base.save_pretrained(tmp_path / "base")
    model, _ = load(plugin, type(base).from_pretrained(tmp_path / "base"))
    adapter, complete = tmp_path / "adapter", tmp_path / "complete"
    for folder in (adapter, complete):
        model.save_pretrained(folder)
        base.config.save_pretrained(folder)
    base.save_pretrained(complete)
    inputs = without_labels(make_inputs())
    loaded = PeftModel.from_pretrained(make_llava(), adapter)
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)
    for folder in (adapter, complete):
        plugin.M2PTPlugin().post_train_unload(Options(**OPTIONS, output_dir=str(folder)))
    assert not (adapter / "config.json").exists()
    assert (complete / "config.json").exists()
    plugin.M2PTPlugin().post_train_unload(Options(adapter="lora", output_dir=str(complete)))
    assert (complete / "config.json").exists()
