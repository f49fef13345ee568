"""torch.compile: the tuned model is one graph wherever the base model is one, and gives what it gives without."""

import pytest
import torch
from helpers.attention_kernels import stand_ins
from helpers.models import (
    NUM_PATCHES,
    adapt,
    make_config,
    make_inputs,
    make_llava,
    on_top_of,
    randomise,
    trained_by,
    without_labels,
)
from transformers import CompileConfig, StaticCache

from peft_m2pt import M2PTAttention


@pytest.fixture(autouse=True)
def dynamo():
    torch._dynamo.reset()
    # LLaVA compares numbers of image tokens, which takes more than one graph without this.
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        yield
    torch._dynamo.reset()


def make_small(attn="sdpa"):
    """A LLaVA with two vision layers, of which one is live, and one text layer: less to trace."""
    model = make_llava(attn=attn)
    model.model.vision_tower.encoder.layers = model.model.vision_tower.encoder.layers[:2]
    model.model.language_model.layers = model.model.language_model.layers[:1]
    model.config.vision_config.num_hidden_layers, model.config.text_config.num_hidden_layers = 2, 1
    return model


class Backend:
    """Runs graphs as they are, and counts them."""

    def __init__(self):
        self.num_graphs = 0

    def __call__(self, graph, inputs):
        self.num_graphs += 1
        return graph.forward


def compiled(model, backend="aot_eager"):
    # transformers hangs hooks on its modules in their first call.
    model(**make_inputs())
    return torch.compile(model, backend=backend, fullgraph=True)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


def check_training(model, expected, compiled, inputs):
    loss, expected_loss = compiled(**inputs).loss, expected(**inputs).loss
    assert_close(loss, expected_loss)
    loss.backward()
    expected_loss.backward()
    gradients = trained_by(expected)
    for name, parameter in trained_by(model).items():
        assert_close(parameter.grad, gradients[name].grad)


@pytest.mark.parametrize("attn, padding", [("eager", "right"), ("sdpa", "left"), ("sdpa", "no mask")])
def test_training(attn, padding):
    expected, model = (adapt(make_small(attn)).train() for _ in range(2))
    check_training(model, expected, compiled(model), make_inputs(padding))


def test_checkpointing():
    expected, model = (adapt(make_small()).train() for _ in range(2))
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    check_training(model, expected, torch.compile(model, backend="aot_eager"), make_inputs("left"))


@pytest.mark.parametrize(
    "config", [{"interaction_placement": "image"}, {"connector_rank": 2}, {"tune_connector": False}], ids=str
)
@torch.no_grad()
def test_interaction(config):
    num_image_tokens = NUM_PATCHES + 2 * ("interaction_placement" in config)
    inputs = make_inputs("left", num_image_tokens=num_image_tokens)
    model = adapt(make_small(), **config)
    expected = model(**inputs).loss
    assert_close(torch.compile(model, backend="eager", fullgraph=True)(**inputs).loss, expected)


@torch.no_grad()
def test_flash_attention():
    inputs = without_labels(make_inputs("no mask"))
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with stand_ins():
        model = adapt(make_small("flash_attention_2")).bfloat16()
        expected = model(**inputs).logits
        assert_close(torch.compile(model, backend="eager", fullgraph=True)(**inputs).logits, expected)


def test_steps_of_training_take_one_graph():
    backend = Backend()
    model = adapt(make_small()).train()
    step = compiled(model, backend)
    optimizer = torch.optim.SGD(trained_by(model).values(), lr=0.1)
    losses = []
    for _ in range(4):
        loss = step(**make_inputs("left")).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert backend.num_graphs == 1
    assert len(set(losses)) == 4


@torch.no_grad()
def test_switching_adapters():
    """
    Also what PEFT's suite asks: test_torch_compile.test_causal_lm_multiple_lora_adapter_compile,
    ..._disable_lora_adapter_compile.
    """
    inputs = make_inputs("left")
    model = adapt(make_small())
    model.add_adapter("other", make_config(num_textual_tokens=5))
    randomise(model, seed=9)
    model.eval()
    backend = Backend()
    model_compiled = compiled(model, backend)
    num_graphs = []
    for _ in range(3):
        for name in ("default", "other"):
            model.set_adapter(name)
            assert_close(model_compiled(**inputs).logits, model(**inputs).logits)
        with model.disable_adapter():
            assert torch.equal(model_compiled(**inputs).logits, make_small()(**inputs).logits)
        num_graphs.append(backend.num_graphs)
    # Graphs for what has been seen are used again.
    assert num_graphs[1] == num_graphs[2]


GENERATION = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


class TestDecoding:
    """With a static cache, `generate` compiles the steps after the first one."""

    def generate(self, model, inputs, backend, **kwargs):
        config = CompileConfig(backend=backend, fullgraph=True, mode=None)
        config._compile_all_devices = True
        return model.generate(**inputs, **GENERATION, **kwargs, cache_implementation="static", compile_config=config)

    @torch.no_grad()
    def test_all_steps_take_one_graph(self, monkeypatch):
        backend = Backend()
        monkeypatch.setattr(Backend, "__deepcopy__", lambda self, memo: self, raising=False)
        model = adapt(make_small())
        records = []
        record = M2PTAttention._record
        monkeypatch.setattr(M2PTAttention, "_record", lambda self, *args: records.append(self) or record(self, *args))
        for seed in range(3):
            inputs = without_labels(make_inputs("left", seed=seed))
            expected = model.generate(**inputs, **GENERATION)
            records.clear()
            assert torch.equal(self.generate(model, inputs, backend), expected)
            # In each tower, in front of the first step. The compiled ones take the rows as they are.
            assert len(records) == len(set(records)) == 2
        assert backend.num_graphs == 1

    @torch.no_grad()
    def test_between_changes(self, monkeypatch):
        backend = Backend()
        model = adapt(make_small())
        model.add_adapter("other", make_config(num_textual_tokens=5))
        randomise(model, seed=9)
        model.eval()
        inputs = without_labels(make_inputs("left"))
        for change in (
            lambda: model.set_adapter("other"),
            lambda: randomise(model, seed=10),
            lambda: model.set_adapter("default"),
            lambda: model.base_model.disable_adapter_layers(),
        ):
            before = self.generate(model, inputs, backend, output_logits=True, return_dict_in_generate=True).logits
            change()
            after = self.generate(model, inputs, backend, output_logits=True, return_dict_in_generate=True).logits
            expected = model.generate(**inputs, **GENERATION, output_logits=True, return_dict_in_generate=True).logits
            assert_close(torch.stack(after), torch.stack(expected))
            assert not torch.allclose(torch.stack(after), torch.stack(before))

    @torch.no_grad()
    def test_caches_of_other_calls(self):
        """A compiled step on a new cache does not take the rows that were kept for another one."""
        model = adapt(make_small())
        step = compiled(model)
        first = torch.tensor([[5], [6]])

        def new_cache():
            return StaticCache(config=model.config.text_config, max_cache_len=16)

        cache = new_cache()
        model(**without_labels(make_inputs()), **on_top_of(cache))
        step(input_ids=first, **on_top_of(cache))
        for seed in (3, 4):
            randomise(model, seed=seed)
            expected = model(input_ids=first).logits
            assert_close(step(input_ids=first, **on_top_of(new_cache())).logits, expected)
