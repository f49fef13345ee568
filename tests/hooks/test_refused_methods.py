"""Continuous batching is refused by name, before a request is taken, and works again without prompts."""

import copy
import pickle
import re

import pytest
import torch
from helpers.models import VOCAB_SIZE, adapt, make_config, make_llava
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation.continuous_batching import PagedAttentionCache

from peft_m2pt import UnsupportedModelError


REQUEST = [5, 6, 7]
OPTIONS = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=2, pad_token_id=0)
BATCHING = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=16)
REFUSED = (
    r"active M2PT prompts at 'model.layers.0.self_attn', which continuous batching does not support"
    r".*generate\(\.\.\.\)"
)


def make_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCAB_SIZE
    )
    return LlamaForCausalLM(config).eval()


def adapt_llama(**kwargs):
    return adapt(make_llama(), num_visual_tokens=0, num_interaction_tokens=0, **kwargs)


def generate_batch(model) -> list[int]:
    outputs = model.generate_batch(
        [REQUEST], generation_config=OPTIONS, continuous_batching_config=BATCHING, progress_bar=False
    )
    (output,) = outputs.values()
    assert output.error is None
    return output.generated_tokens


def generate(model) -> list[int]:
    return model.generate(torch.tensor([REQUEST]), generation_config=OPTIONS)[0, len(REQUEST) :].tolist()


@pytest.mark.parametrize("unwrap", [lambda model: model, lambda model: model.get_base_model()])
def test_refused_by_every_entrance(unwrap):
    """What `use_transformers_continuous_batching=True` of TRL and `transformers serve` start with."""
    model = unwrap(adapt_llama())
    with pytest.raises(UnsupportedModelError, match=REFUSED):
        generate_batch(model)
    with pytest.raises(UnsupportedModelError, match=REFUSED):
        model.init_continuous_batching(generation_config=OPTIONS, continuous_batching_config=BATCHING)
    with pytest.raises(UnsupportedModelError, match=REFUSED):
        with model.continuous_batching_context_manager(generation_config=OPTIONS):
            raise AssertionError("a manager was made")


def test_refused_whichever_layer_has_prompts():
    model = adapt_llama(textual_layers=[1])
    with pytest.raises(UnsupportedModelError, match="active M2PT prompts at 'model.layers.1.self_attn'"):
        generate_batch(model)
    model.add_adapter("first", make_config(num_visual_tokens=0, num_interaction_tokens=0, textual_layers=[0]))
    model.set_adapter("first")
    with pytest.raises(UnsupportedModelError, match="active M2PT prompts at 'model.layers.0.self_attn'"):
        generate_batch(model)
    model.delete_adapter("first")
    model.set_adapter("default")
    with pytest.raises(UnsupportedModelError, match="active M2PT prompts at 'model.layers.1.self_attn'"):
        generate_batch(model)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_refused_by_copies(duplicate):
    original = adapt_llama()
    model = duplicate(original)
    with original.disable_adapter(), pytest.raises(UnsupportedModelError, match=REFUSED):
        generate_batch(model)


def test_works_without_prompts():
    expected = generate(make_llama())
    model = adapt_llama()
    with model.disable_adapter():
        assert generate_batch(model) == expected
    base = model.unload()
    assert generate_batch(base) == expected
    assert "init_continuous_batching" not in vars(base)


def test_taken_with_visual_prompts_alone():
    """Requests of continuous batching are texts."""
    model = adapt(make_llava(), num_textual_tokens=0, num_interaction_tokens=0, tune_connector=False)
    manager = model.init_continuous_batching(generation_config=OPTIONS, continuous_batching_config=BATCHING)
    assert not manager.is_running()


def test_managers_that_are_older_than_the_prompts():
    model = adapt_llama()
    with model.disable_adapter():
        manager = model.init_continuous_batching(generation_config=OPTIONS, continuous_batching_config=BATCHING)
    manager.start()
    try:
        request = manager.add_request(REQUEST, max_new_tokens=4)
        output = manager.get_result(request, timeout=60)
    finally:
        manager.stop(block=True)
    # The second is what attention implementations of transformers 5.8 are told.
    assert re.search(r"called with a paged cache|attn_implementation='paged\|sdpa'", output.error)


def test_attention_refuses_a_paged_cache():
    model = adapt(make_llava())
    attention = model.base_model.model.model.language_model.layers[0].self_attn
    arguments = {"position_embeddings": (torch.ones(1, 2, 12), torch.zeros(1, 2, 12)), "attention_mask": None}
    with pytest.raises(UnsupportedModelError, match=r"called with a paged cache, .* Use generate\(...\)"):
        attention(torch.randn(1, 2, 48), **arguments, cache=object.__new__(PagedAttentionCache))
