"""The plugin for ms-swift, at the level of its class: ms-swift itself asks for another version of PEFT."""

import sys
from types import ModuleType

import pytest
import torch
from helpers.models import make_inputs, make_llava, trained_by, without_labels
from peft import PeftModel

from peft_m2pt import M2PTConfig


class PeftTuner:
    """As in `swift/tuner_plugin/base.py` of ms-swift 4.6.0."""

    @staticmethod
    def save_pretrained(model, save_directory, state_dict=None, safe_serialization=True, **kwargs):
        kwargs.setdefault("selected_adapters", ["default"])
        model.save_pretrained(save_directory, safe_serialization=safe_serialization, **kwargs)

    @staticmethod
    def from_pretrained(model, model_id, **kwargs):
        return PeftModel.from_pretrained(model, model_id, **kwargs)


@pytest.fixture
def tuner(monkeypatch):
    """What the plugin puts into ms-swift."""
    module = ModuleType("swift.tuner_plugin")
    module.PeftTuner, module.tuners_map = PeftTuner, {}
    monkeypatch.setitem(sys.modules, "swift", ModuleType("swift"))
    monkeypatch.setitem(sys.modules, "swift.tuner_plugin", module)
    monkeypatch.delitem(sys.modules, "peft_m2pt.integrations.ms_swift", raising=False)
    from peft_m2pt.integrations.ms_swift import register

    register(M2PTConfig(num_visual_tokens=4, num_textual_tokens=3))
    return module.tuners_map["m2pt"]


def test_plugin(tuner, tmp_path):
    model = tuner.prepare_model(None, make_llava())
    assert len(trained_by(model)) == 10
    assert model.peft_config["default"].num_visual_tokens == 4
    assert all(("m2pt_" in name) == parameter.requires_grad for name, parameter in model.named_parameters())
    tuner.save_pretrained(model, tmp_path, state_dict={})
    for kwargs in ({}, {"is_trainable": True}, {"adapter_name": "ref_adapter", "is_trainable": True}):
        loaded = tuner.from_pretrained(make_llava(), tmp_path, **kwargs)
        assert any(parameter.requires_grad for parameter in loaded.parameters()) == ("is_trainable" in kwargs)
        inputs = without_labels(make_inputs())
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)
