"""`torch.jit.trace` and `torch.export` of tuned models, with which exporters start: right for other inputs too."""

import warnings

import pytest
import torch
from helpers.models import adapt, make_inputs, make_llava, without_labels
from torch import nn


class WithTensors(nn.Module):
    """Takes and gives tensors alone, as what is traced must."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.model(**dict(zip(self.names, tensors)), use_cache=False).logits


@torch.no_grad()
def check(model, traced_on, others):
    traced_on, *others = ({**inputs} for inputs in (traced_on, *others))
    module = WithTensors(model.eval(), list(traced_on))
    with warnings.catch_warnings():
        # Of conditions on shapes, which are the same for all of these inputs.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(module, tuple(traced_on.values()), check_trace=False)
    for inputs in (traced_on, *others):
        expected = module(*inputs.values())
        actual = traced(*inputs.values())
        assert actual.shape == expected.shape
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        torch.testing.assert_close(actual[mask], expected[mask], atol=1e-5, rtol=1e-5)


def shortened(inputs, length):
    return {name: value[:, :-length] if name != "pixel_values" else value for name, value in inputs.items()}


def prepare(*args, **kwargs):
    return without_labels(make_inputs(*args, **kwargs))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("text", ["llama", "mistral", "qwen2"])
def test_images(attn, text):
    inputs = prepare("none")
    others = [prepare("left"), prepare("right"), shortened(prepare("left"), 3), prepare("none", seed=7)]
    check(adapt(make_llava(text=text, attn=attn)), inputs, others)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
# From one sample without a mask, transformers looks for packed sequences, which ties a trace to one, M2PT or not.
@pytest.mark.parametrize("num_samples, with_mask", [(1, True), (2, True), (2, False)])
def test_text_in_batches_of_other_sizes(attn, num_samples, with_mask):
    inputs = prepare("left" if with_mask else "no mask", images=False)
    first = {name: value[:num_samples] for name, value in inputs.items()}
    three = {name: torch.cat([value, value[:1]]) for name, value in inputs.items()}
    check(adapt(make_llava(attn=attn)), first, [inputs, three, shortened(three, 4)])


@pytest.mark.parametrize("kwargs", [{"num_textual_tokens": 0}, {"num_visual_tokens": 0}, {"connector_rank": 2}])
def test_kinds_of_prompts(kwargs):
    check(adapt(make_llava(), **kwargs), prepare("none"), [prepare("right")])


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@torch.no_grad()
def test_export(attn):
    """Of text, with any number of samples and tokens."""
    inputs = prepare("left", images=False)
    module = WithTensors(adapt(make_llava(attn=attn)).eval(), list(inputs))
    dims = {0: torch.export.Dim("batch", min=2, max=8), 1: torch.export.Dim("length", min=4, max=64)}
    shapes = {"tensors": tuple(dims for _ in inputs)}
    exported = torch.export.export(module, tuple(inputs.values()), dynamic_shapes=shapes, strict=False).module()
    three = {name: torch.cat([value, value[:1]]) for name, value in inputs.items()}
    for other in (inputs, prepare("right", images=False), three, shortened(three, 4)):
        mask = other["attention_mask"].bool()
        expected = module(*other.values())
        torch.testing.assert_close(exported(*other.values())[mask], expected[mask], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_export_with_images():
    inputs = prepare("none")
    module = WithTensors(adapt(make_llava()).eval(), list(inputs))
    exported = torch.export.export(module, tuple(inputs.values()), strict=False).module()
    other = prepare("none", seed=7)
    torch.testing.assert_close(exported(*other.values()), module(*other.values()), atol=1e-5, rtol=1e-5)
