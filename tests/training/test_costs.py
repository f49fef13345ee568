"""
What M2PT adds to the work of a model: operations and bytes, counted, so that the numbers are the same on any machine.

"Prompts only" are visual and textual prompts. By default there are interaction prompts too: as many rows as visual
prompts in each layer of the language model, which come out of the connector there.
"""

import pytest
import torch
from torch import nn

from benchmarks.measure import forward_flops, peak_bytes, saved_bytes
from benchmarks.methods import base_model, lengthened, lengthened_prompts_only, lora, m2pt, prompts_only
from benchmarks.models import DIMS, make_inputs, make_model


BATCH_SIZE = 4


@pytest.fixture(scope="module")
def flops():
    """Operations of a forward pass of the medium model, by module path."""
    medium = DIMS["medium"]
    base = make_model(medium, "meta")
    return lambda method: forward_flops(method.apply(base), medium, BATCH_SIZE)


@pytest.fixture(scope="module")
def flops_of_base(flops):
    return flops(base_model())["Global"]


def test_flops_of_the_base_are_those_of_its_matrices(flops_of_base):
    medium = DIMS["medium"]
    vision, text = medium.vision, medium.text
    num_patches, length = medium.num_image_tokens, medium.num_image_tokens + medium.num_text_tokens

    def of_layer(width, inner, num_matrices, num_tokens):
        projections = num_tokens * (4 * width**2 + num_matrices * width * inner)
        return 2 * (projections + 2 * num_tokens**2 * width)

    expected = vision["num_hidden_layers"] * of_layer(
        vision["hidden_size"], vision["intermediate_size"], 2, num_patches + 1
    )
    expected += 2 * num_patches * vision["hidden_size"] * 3 * vision["patch_size"] ** 2
    expected += 2 * num_patches * (vision["hidden_size"] * text["hidden_size"] + text["hidden_size"] ** 2)
    expected += text["num_hidden_layers"] * of_layer(text["hidden_size"], text["intermediate_size"], 3, length)
    expected += 2 * length * text["hidden_size"] * text["vocab_size"]
    # Some versions of transformers compute the angles of rotations as a product of matrices.
    assert flops_of_base == pytest.approx(BATCH_SIZE * expected, rel=1e-7)


@pytest.mark.parametrize(
    ("method", "bound"),
    [
        (prompts_only(20, 10), 1.004),
        (prompts_only(100, 100), 1.034),
        (prompts_only(0, 10), 1.004),
        # With interaction prompts: more rows in each text layer, and the connector for each of them.
        (m2pt(20, 10), 1.01),
        (m2pt(100, 100), 1.067),
        (m2pt(0, 10), 1.004),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_flops_of_a_forward_pass(method, bound, flops, flops_of_base):
    assert 1 < flops(method)["Global"] / flops_of_base <= bound


@pytest.mark.parametrize("numbers", [(20, 10), (100, 100)], ids=str)
def test_longer_sequences_need_more_flops(numbers, flops, flops_of_base):
    pairs = [(prompts_only, lengthened_prompts_only), (m2pt, lengthened)]
    for method, longer in pairs:
        extra, extra_of_longer = (flops(method(*numbers))["Global"] - flops_of_base for method in (method, longer))
        assert 4 * extra < extra_of_longer


def test_activations_of_a_training_step():
    # At one sample, where rows that the whole batch shares weigh most.
    medium = DIMS["medium"]
    base, inputs = make_model(medium), make_inputs(medium, batch_size=1)
    kept = {method.name: saved_bytes(method.apply(base), inputs) for method in (lora(medium), m2pt(20, 10))}
    assert kept["M2PT (20, 10)"] <= 0.96 * kept["LoRA r=8"]


def test_bytes_are_counted_once():
    linear = nn.Linear(100, 100)
    tokens = torch.randn(50, 100, requires_grad=True)

    def run():
        hidden_states = linear(tokens)
        return hidden_states.relu() + hidden_states.relu()

    # The input of the linear layer, and the output of each activation; neither the weight nor anything twice.
    assert saved_bytes(run_as_module(linear, run), {}) == 3 * tokens.nbytes
    # Beyond that: what the activations see, and their sum.
    assert peak_bytes(run, "cpu") == 4 * tokens.nbytes


def run_as_module(linear, function):
    module = nn.Module()
    module.linear = linear
    module.forward = function
    return module
