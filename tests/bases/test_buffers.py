"""Bases whose linear layers keep their weights in buffers, as those of BitNet, GPTQ and AWQ do."""

import pytest
import torch
from helpers.models import make_config, make_inputs, make_llava, randomise, without_labels
from peft import get_peft_model
from torch import nn
from transformers.integrations.bitnet import BitLinear

from peft_m2pt import M2PTConfig


class PackedLinear(nn.Module):
    """A stand-in: integers with a scale for each output, and no parameters."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scales = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (linear.weight.detach() / scales).round().to(torch.int8))
        self.register_buffer("scales", scales.to(dtype))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().to(dtype))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        # Kernels take the type of their scales and no other.
        assert states.dtype == self.scales.dtype
        return nn.functional.linear(states, self.qweight * self.scales, self.bias)


def bit_linear(linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
    return BitLinear(linear.in_features, linear.out_features, linear.bias is not None, dtype=dtype)


def make_base(make_linear=PackedLinear, dtype=torch.float32, parts=("layers", "projector")):
    model = make_llava().to(dtype)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and any(part in path for part in parts):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, make_linear(module, dtype))
    return model


def of_adapter(model):
    return {name: parameter for name, parameter in model.named_parameters() if "m2pt_" in name}


@pytest.mark.parametrize("make_linear", [PackedLinear, bit_linear])
@pytest.mark.parametrize("kwargs", [{"num_interaction_tokens": 20}, {"interaction_placement": "image"}])
def test_devices(make_linear, kwargs):
    """The meta device stands for a GPU."""
    model = get_peft_model(make_base(make_linear).to("meta"), M2PTConfig(connector_rank=2, **kwargs))
    weights = of_adapter(model)
    assert any("m2pt_prompt" in name for name in weights) and any("m2pt_interaction" in name for name in weights)
    assert {weight.device.type for weight in weights.values()} == {"meta"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    model = get_peft_model(make_base(dtype=dtype), make_config(connector_rank=2), autocast_adapter_dtype=False)
    prompts = {name: weight for name, weight in of_adapter(model).items() if "connector" not in name}
    assert len(prompts) == 4 - 1 + 2 * 3
    assert {weight.dtype for weight in prompts.values()} == {dtype}


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("placement", ["layers", "image"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_and_trains(dtype, placement, autocast):
    config = make_config(connector_rank=2, interaction_placement=placement)
    model = get_peft_model(make_base(dtype=dtype), config, autocast_adapter_dtype=autocast)
    randomise(model, seed=2)
    inputs = make_inputs(num_image_tokens=6 if placement == "image" else 4)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    model(**inputs).loss.backward()
    for name, weight in of_adapter(model).items():
        assert weight.grad.isfinite().all() and weight.grad.any(), name
    tokens = model.eval().generate(**without_labels(inputs), max_new_tokens=3, min_new_tokens=3)
    assert tokens.shape[1] == inputs["input_ids"].shape[1] + 3


def test_no_copy_of_packed_weights():
    message = r"'model.multi_modal_projector' has quantized linear layers \['linear_1', 'linear_2'\].*connector_rank=8"
    with pytest.raises(ValueError, match=message):
        get_peft_model(make_base(), M2PTConfig(connector_rank=None))
    model = get_peft_model(make_base(), M2PTConfig())
    assert model.peft_config["default"].to_dict()["connector_rank"] == 48
