"""
Plays the next release of transformers: attention modules whose arguments have other names, another order, and more of
them. What M2PT gives with these is what it gives with Llama as it is.
"""

import functools

import pytest
import torch
from helpers.models import VOCAB_SIZE, adapt, trained_by
from torch import nn
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils.deprecation import deprecate_kwarg

from peft_m2pt import M2PTAttention, UnsupportedModelError
from peft_m2pt.anatomy.arguments import Role, read_signature


NEW_NAMES = {
    "hidden_states": "x",
    "position_embeddings": "angles",
    "attention_mask": "visible",
    "past_key_values": "memory",
    "cache": "memory",
}


def renames(forward):
    """What a release does that renames arguments: callers may go on with the old names."""
    for old, new in NEW_NAMES.items():
        forward = deprecate_kwarg(old, "99.0", new_name=new)(forward)
    return forward


def logs(forward):
    """Some other decorator."""

    @functools.wraps(forward)
    def wrapper(*args, **kwargs):
        return forward(*args, **kwargs)

    return wrapper


def split(attention, x):
    shape = (*x.shape[:-1], -1, attention.head_dim)
    return (proj(x).view(shape).transpose(1, 2) for proj in (attention.q_proj, attention.k_proj, attention.v_proj))


def join(attention, output, x):
    return attention.o_proj(output.reshape(*x.shape[:-1], -1).contiguous())


class Annotated(LlamaAttention):
    """Tells by annotations. One argument is new and optional."""

    def forward(
        self,
        x: torch.Tensor,
        memory: Cache | None = None,
        temperature: float | None = None,
        visible: torch.Tensor | None = None,
        angles: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs,
    ):
        queries, keys, values = split(self, x)
        queries, keys = apply_rotary_pos_emb(queries, keys, angles[0], angles[1])
        if memory is not None:
            keys, values = memory.update(keys, values, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        scaling = self.scaling / (temperature or 1.0)
        output, weights = attend(self, queries, keys, values, visible, scaling=scaling, **kwargs)
        return join(self, output, x), weights


class Bare(LlamaAttention):
    """Tells by its code alone."""

    def forward(self, x, visible=None, memory=None, extra=7, angles=None, **kwargs):
        queries, keys, values = split(self, x)
        first, second = angles
        queries, keys = apply_rotary_pos_emb(queries, keys, first, second)
        if memory is not None:
            keys, values = memory.update(keys, values, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        visible = visible[:, :, :, : keys.shape[-2]] if visible is not None else None
        output, weights = attend(self, queries, keys, values, attention_mask=visible, scaling=self.scaling, **kwargs)
        return join(self, output, x), weights


class Renamed(Annotated):
    """Is called with the old names."""

    forward = logs(renames(Annotated.forward))


class RenamedBare(Bare):
    forward = renames(logs(Bare.forward))


class Requires(LlamaAttention):
    @renames
    def forward(self, x, angles, visible, tempo, memory=None, **kwargs):
        queries, keys, values = split(self, x)
        queries, keys = apply_rotary_pos_emb(queries, keys, *angles)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        return attend(self, queries, keys, values, visible, **kwargs)


class NewLayer(LlamaDecoderLayer):
    """Calls its attention with the new names."""

    options: dict = {}

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, **kwargs):
        memory = kwargs.pop("past_key_values", None) or kwargs.pop("cache", None)
        kwargs.pop("cache", None)
        states = self.input_layernorm(hidden_states)
        output, _ = self.self_attn(
            states, memory=memory, angles=position_embeddings, visible=attention_mask, **self.options, **kwargs
        )
        hidden_states = hidden_states + output
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


def make_model(attention=LlamaAttention, layer=LlamaDecoderLayer, attn="sdpa") -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB_SIZE,
        pad_token_id=0,
        initializer_range=0.2,
    )
    config._attn_implementation = attn
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for index, old in enumerate(model.model.layers):
        new = model.model.layers[index] = layer(config, index)
        new.load_state_dict(old.state_dict())
        new.self_attn = attention(config, index)
        new.self_attn.load_state_dict(old.self_attn.state_dict())
    return model.eval()


def adapt_text(model):
    return adapt(model, num_visual_tokens=0, num_interaction_tokens=0)


INPUT_IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [0, 0, 12, 13, 14, 15, 16]])
INPUTS = {"input_ids": INPUT_IDS, "attention_mask": (INPUT_IDS != 0).long()}
PLAYED = [(Annotated, NewLayer), (Bare, NewLayer), (Renamed, LlamaDecoderLayer), (RenamedBare, LlamaDecoderLayer)]


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("attention, layer", PLAYED)
class TestStillWorks:
    def test_loss_and_gradients(self, attention, layer, attn):
        model, expected = adapt_text(make_model(attention, layer, attn)), adapt_text(make_model(attn=attn))
        losses = [tuned(**INPUTS, labels=INPUT_IDS).loss for tuned in (model, expected)]
        assert torch.equal(*losses)
        for loss in losses:
            loss.backward()
        of_llama = trained_by(expected)
        for name, parameter in trained_by(model).items():
            assert torch.equal(parameter.grad, of_llama[name].grad)

    @torch.no_grad()
    def test_generation(self, attention, layer, attn, monkeypatch):
        model, expected = adapt_text(make_model(attention, layer, attn)), adapt_text(make_model(attn=attn))
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": 2, "use_cache": True}
        options |= {"output_scores": True, "return_dict_in_generate": True}
        records, record = [], M2PTAttention._record
        monkeypatch.setattr(M2PTAttention, "_record", lambda self, *args: records.append(self) or record(self, *args))
        outputs = [tuned.generate(**INPUTS, **options) for tuned in (model, expected)]
        assert torch.equal(*(output.sequences for output in outputs))
        torch.testing.assert_close(*(output.sequences_scores for output in outputs), atol=1e-6, rtol=1e-6)
        assert len(records) == len(set(records)), "the cache was not found, so rows were computed anew for every token"


@pytest.mark.parametrize("attention", [Annotated, Bare, Renamed, RenamedBare])
def test_roles(attention):
    roles = {argument.name: argument.role for argument in read_signature(attention).arguments}
    assert roles.pop("temperature" if issubclass(attention, Annotated) else "extra") is None
    assert roles == {"x": Role.INPUT, "memory": Role.CACHE, "visible": Role.MASK, "angles": Role.ROTATIONS}


def test_a_required_argument_is_refused_by_name():
    model = make_model(Requires)
    state = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(UnsupportedModelError, match=r"'model.layers.0.self_attn' \(Requires\) takes \['tempo'\]"):
        adapt_text(model)
    assert state == {name: id(module) for name, module in model.named_modules()}


@pytest.mark.parametrize("attention, options", [(Annotated, {"temperature": None}), (Bare, {"extra": 7})])
def test_values_that_leave_an_argument_out(attention, options):
    model = adapt_text(make_model(attention, type("Layer", (NewLayer,), {"options": options})))
    assert torch.equal(model(**INPUTS).logits, adapt_text(make_model())(**INPUTS).logits)


@pytest.mark.parametrize(
    "attention, options, shown",
    [
        (Annotated, {"temperature": 2.0}, r"temperature=2\.0"),
        (Bare, {"extra": True}, "extra=True"),
        (Bare, {"extra": torch.ones(2, 3)}, r"extra=a tensor of shape \(2, 3\)"),
        (Bare, {"extra": (torch.ones(2, 3),)}, "extra=a value of type tuple"),
    ],
)
def test_unknown_values_are_refused_before_anything_is_computed(attention, options, shown):
    model = adapt_text(make_model(attention, type("Layer", (NewLayer,), {"options": options})))
    calls = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *args: calls.append(args))
    message = rf"'model.layers.0.self_attn' \({attention.__name__}\) was called with {shown}, .* exclude_modules="
    with pytest.raises(UnsupportedModelError, match=message):
        model(**INPUTS)
    assert not calls
    with model.disable_adapter():
        model(**INPUTS)


@torch.no_grad()
def test_unknown_values_are_refused_while_decoding():
    layer = type("Layer", (NewLayer,), {})
    model = adapt_text(make_model(Annotated, layer))
    cache = DynamicCache(config=model.get_base_model().config)
    for start, stop in ((0, 4), (4, 5), (5, 6)):
        model(input_ids=INPUT_IDS[:, start:stop], past_key_values=cache)
    layer.options = {"temperature": 2.0}
    with pytest.raises(UnsupportedModelError, match=r"was called with temperature=2\.0"):
        model(input_ids=INPUT_IDS[:, 6:], past_key_values=cache)
    assert cache.get_seq_length() == 6
