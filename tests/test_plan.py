"""Models and layers that cannot be adapted are refused before anything is changed."""

import pytest
import torch
from helpers.models import adapt, make_config, make_inputs, make_llava
from peft import get_peft_model
from torch import nn
from transformers import BertConfig, BertLMHeadModel, CLIPVisionModel, LlamaForCausalLM
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.llama.modeling_llama import LlamaAttention

from peft_m2pt import M2PTAttention, M2PTConfig, UnsupportedModelError
from peft_m2pt.layers.base import M2PTLayer
from peft_m2pt.layers.initializer import PromptInitializer


class OwnAttention(LlamaAttention):
    """Computes attention on its own, without asking the attention interface."""

    def forward(self, hidden_states, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            projection(hidden_states).view(shape).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        output = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.o_proj(output.transpose(1, 2).flatten(2)), None


def refused(model, config, *parts, error=UnsupportedModelError):
    modules = dict(model.named_modules())
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(error) as info:
        get_peft_model(model, config)
    for part in parts:
        assert part in str(info.value), str(info.value)
    assert isinstance(info.value, ValueError)
    after = dict(model.named_modules())
    assert after.keys() == modules.keys() and all(after[name] is modules[name] for name in modules)
    assert trainable == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert not hasattr(model, "peft_config")


def test_attention_that_bypasses_the_interface():
    model = make_llava()
    layer = model.model.language_model.layers[1]
    layer.self_attn = OwnAttention(model.config.text_config, 1)
    refused(
        model,
        M2PTConfig(),
        "'model.language_model.layers.1.self_attn' (OwnAttention) bypasses the attention interface",
        "num_textual_tokens=0",
        "text_decoder=",
    )
    # The vision encoder alone still works.
    assert get_peft_model(model, M2PTConfig(num_textual_tokens=0)).peft_type == "M2PT"


def test_attention_that_bypasses_the_interface_in_a_call():
    model = make_llava()
    peft_model = adapt(model)
    attention = model.model.language_model.layers[1].self_attn
    attention.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    with pytest.raises(UnsupportedModelError, match=r"'model.language_model.layers.1.self_attn' .* bypassed"):
        peft_model(**make_inputs())


def test_other_attention_implementations():
    model = make_llava()
    model.config.text_config._attn_implementation = "paged|eager"
    refused(
        model,
        M2PTConfig(),
        "attn_implementation='paged|eager'",
        "'model.language_model.layers.0.self_attn'",
        "('eager', 'sdpa', 'flash_attention_2', 'flash_attention_3', 'flash_attention_4', 'flex_attention')",
        "set_attn_implementation",
    )


def test_other_attention_implementation_set_later():
    peft_model = adapt(make_llava())
    peft_model.config.text_config._attn_implementation = "paged|eager"
    with pytest.raises(UnsupportedModelError, match=r"attn_implementation='paged\|eager'"):
        peft_model(**make_inputs())
    peft_model.get_base_model().set_attn_implementation("eager")
    expected = adapt(make_llava(attn="eager"))(**make_inputs()).logits
    assert torch.equal(peft_model(**make_inputs()).logits, expected)


class NoTransformersModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)


def test_no_vision_encoder():
    model = LlamaForCausalLM(make_llava().config.text_config)
    refused(model, M2PTConfig(), "No vision encoder", "LlamaForCausalLM", "vision_encoder=", "num_visual_tokens=0")
    peft_model = get_peft_model(model, M2PTConfig(num_visual_tokens=0))
    assert sum(isinstance(module, M2PTAttention) for module in peft_model.modules()) == 3


def test_no_language_model():
    model = CLIPVisionModel(make_llava().config.vision_config)
    refused(model, M2PTConfig(), "No language model", "CLIPVisionModel", "text_decoder=", "num_textual_tokens=0")
    peft_model = get_peft_model(model, M2PTConfig(num_textual_tokens=0))
    assert sum(isinstance(module, M2PTAttention) for module in peft_model.modules()) == 4


def test_no_transformers_model():
    refused(NoTransformersModel(), M2PTConfig(), "No vision encoder", "NoTransformersModel", "vision_encoder=")


def test_no_attention():
    refused(
        make_llava(),
        M2PTConfig(vision_encoder="model.multi_modal_projector"),
        "'model.multi_modal_projector' (LlavaMultiModalProjector) has no layer with self-attention",
        "vision_encoder=",
        "num_visual_tokens=0",
    )


def test_attention_that_is_taken_for_cross_attention():
    """Layers of BERT hand their self-attention the output of an encoder too, if it is to be cross-attention."""
    model = BertLMHeadModel(
        BertConfig(
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=99,
            is_decoder=True,
        )
    )
    refused(
        model,
        M2PTConfig(num_visual_tokens=0),
        "'bert' (BertModel) has no layer with self-attention and keys of its own",
        "For example, 'bert.encoder.layer.0.attention.self' counts as cross-attention",
        "text_decoder=",
        "num_textual_tokens=0",
    )


@pytest.mark.parametrize("field", ["vision_encoder", "text_decoder"])
def test_paths_that_do_not_exist(field):
    refused(make_llava(), M2PTConfig(**{field: "model.nowhere"}), f"{field}='model.nowhere'", "no module at this path")


def test_paths_that_help():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.eyes = make_llava().model.vision_tower
            self.mouth = make_llava().model.language_model

        def forward(self, pixel_values, input_ids):
            return self.eyes(pixel_values), self.mouth(input_ids)

    refused(Wrapper(), M2PTConfig(), "No vision encoder", "vision_encoder=")
    without_connector = {"num_interaction_tokens": 0, "tune_connector": False}
    config = M2PTConfig(vision_encoder="eyes", text_decoder="mouth", **without_connector)
    peft_model = get_peft_model(Wrapper(), config)
    assert sum(isinstance(module, M2PTAttention) for module in peft_model.modules()) == 4 + 3


def test_input_that_is_not_clear():
    class Doubling(CLIPEncoderLayer):
        def forward(self, hidden_states, attention_mask=None, **kwargs):
            return self.self_attn(hidden_states=2 * self.layer_norm1(hidden_states))[0]

    model = make_llava()
    model.model.vision_tower.encoder.layers[0].__class__ = Doubling
    refused(
        model,
        M2PTConfig(),
        "The input of the attention 'model.vision_tower.encoder.layers.0.self_attn' is not clear",
        "the code of Doubling",
        "num_visual_tokens=0",
    )


@pytest.mark.parametrize(
    "config, parts",
    [
        ({"visual_layers": [0, 3]}, ["visual_layers=[0, 3]", "layer 3", "no influence", "[0, 1, 2]"]),
        ({"visual_layers": [9]}, ["visual_layers=[9]", "layer 9", "does not exist", "[0, 1, 2]"]),
        ({"textual_layers": [-4]}, ["textual_layers=[-4]", "layer -4", "does not exist", "[0, 1, 2]"]),
    ],
    ids=str,
)
def test_layers_that_cannot_have_prompts(config, parts):
    refused(make_llava(), M2PTConfig(**config), *parts, error=ValueError)


def test_placements_that_choose_nothing():
    model = make_llava(vision_feature_layer=1)
    refused(model, M2PTConfig(visual_layers="odd"), "visual_layers='odd'", "[0]", error=ValueError)


def test_embeddings_of_another_width():
    model = make_llava()
    model.set_input_embeddings(nn.Embedding(97, 20))
    refused(model, M2PTConfig(init_prompts="vocabulary"), "init_prompts='vocabulary'", "20", "48", error=ValueError)


def test_attention_that_layers_share():
    model = make_llava()
    layers = model.model.language_model.layers
    layers[2].self_attn = layers[0].self_attn
    refused(model, M2PTConfig(), "'model.language_model.layers.2.self_attn' is shared", "num_textual_tokens=0")


@pytest.mark.parametrize(
    "values", [{"exclude_modules": ["self_attn"]}, {"modules_to_save": ["vision_tower"]}], ids=str
)
def test_prompts_do_not_vanish(values):
    field, names = next(iter(values.items()))
    refused(
        make_llava(),
        M2PTConfig(**values),
        f"{field}={names}",
        "visual prompts",
        "num_visual_tokens=0",
        error=ValueError,
    )


def test_adapter_names_with_dots():
    model = make_llava()
    with pytest.raises(
        ValueError, match="adapter_name='my.adapter': an adapter cannot have this name. Names must not contain dots"
    ):
        get_peft_model(model, M2PTConfig(), adapter_name="my.adapter")
    assert not any(isinstance(module, M2PTLayer) for module in model.modules())


@pytest.mark.parametrize("first", [True, False], ids=["first adapter", "second adapter"])
def test_an_injection_that_fails_half_way_is_taken_back(first, monkeypatch):
    inputs = make_inputs()
    model = make_llava()
    peft_model = None if first else adapt(model, textual_layers=[0])
    expected = model(**inputs).logits
    modules = dict(model.named_modules())
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    calls = []

    make_prompt = PromptInitializer.make_prompt

    def fail(self, *args):
        calls.append(args)
        if len(calls) == 5:
            raise MemoryError("no more")
        return make_prompt(self, *args)

    monkeypatch.setattr(PromptInitializer, "make_prompt", fail)
    with pytest.raises(MemoryError):
        if first:
            get_peft_model(model, make_config(interaction_placement="image"))
        else:
            peft_model.add_adapter("other", make_config(interaction_placement="image"))
    after = dict(model.named_modules())
    assert after.keys() == modules.keys() and all(after[name] is modules[name] for name in modules)
    assert trainable == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert torch.equal(model(**inputs).logits, expected)


def test_exclude_modules():
    path = "model.language_model.layers.1.self_attn"
    peft_model = get_peft_model(make_llava(), M2PTConfig(exclude_modules=[path]))
    paths = [module.site.path for module in peft_model.modules() if isinstance(module, M2PTAttention)]
    assert len(paths) == 3 + 2 and path not in paths


def test_a_second_adapter_that_is_refused_leaves_the_first():
    inputs = make_inputs()
    peft_model = adapt(make_llava())
    expected = peft_model(**inputs).logits
    with pytest.raises(ValueError, match="textual_layers"):
        peft_model.add_adapter("other", M2PTConfig(textual_layers=[7]))
    assert list(peft_model.peft_config) == ["default"]
    assert torch.equal(peft_model(**inputs).logits, expected)
