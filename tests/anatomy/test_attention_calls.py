"""Attention modules that call their attention function more than once, or give it something for each key."""

import pytest
import torch
from helpers.models import PAD_TOKEN, VOCAB_SIZE, make_llava
from peft import get_peft_model
from transformers import CLIPVisionConfig, DiffLlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.diffllama import modeling_diffllama
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb, eager_attention_forward

from peft_m2pt import M2PTAttention, M2PTConfig, UnsupportedModelError
from peft_m2pt.adapted import layer_of


PATH = "model.language_model.layers.0.self_attn"
NUM_PROMPTS = 3


def make_diff_llava(attn):
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
        ),
        text_config=DiffLlamaConfig(
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCAB_SIZE,
            pad_token_id=PAD_TOKEN,
            initializer_range=0.2,
        ),
        image_token_index=VOCAB_SIZE - 1,
    )
    config._attn_implementation = attn
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval()


def adapt(model):
    config = M2PTConfig(num_visual_tokens=0, num_textual_tokens=NUM_PROMPTS, tune_connector=False)
    model = get_peft_model(model, config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "m2pt_" in name:
                parameter.copy_(0.7 * torch.randn(parameter.shape))
    return model


@pytest.mark.skipif(
    not hasattr(modeling_diffllama, "ALL_ATTENTION_FUNCTIONS"),
    reason="DiffLlama bypasses the attention interface, and is refused",
)
class TestOtherValuesInEachCall:
    @pytest.mark.parametrize("attn", ["eager", "sdpa"])
    def test_exact(self, attn):
        model = adapt(make_diff_llava(attn))
        decoder = model.get_base_model().model.language_model
        layers = list(decoder.layers)
        seen = []
        for layer in layers:
            layer.self_attn.register_forward_hook(
                lambda module, args, kwargs, output: seen.append((module, kwargs["hidden_states"], output[0])),
                with_kwargs=True,
            )
        with torch.no_grad():
            model(input_ids=torch.randint(3, 90, (2, 6)), use_cache=False)
            assert len(seen) == len(layers)
            for layer, (module, hidden_states, actual) in zip(layers, seen):
                assert isinstance(layer_of(module), M2PTAttention)
                prompt = layer.input_layernorm(module.m2pt_prompt["default"]()).expand(2, -1, -1)
                rows = torch.cat([prompt, hidden_states], dim=1)
                positions = torch.arange(-NUM_PROMPTS, 6)[None]
                mask = torch.full((9, 9), torch.finfo(torch.float32).min).triu(1)[None, None]
                rotations = decoder.rotary_emb(rows, positions)
                expected = module.forward(rows, position_embeddings=rotations, attention_mask=mask)[0]
                torch.testing.assert_close(actual, expected[:, NUM_PROMPTS:], atol=1e-5, rtol=1e-5)

    def test_training_and_decoding(self):
        model = adapt(make_diff_llava("sdpa"))
        input_ids = torch.randint(3, 90, (2, 6))
        model(input_ids=input_ids, labels=input_ids).loss.backward()
        gradients = [parameter.grad for name, parameter in model.named_parameters() if "m2pt_" in name]
        assert all(gradient.norm(dim=1).min() > 0 for gradient in gradients)
        kwargs = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        cached = model.generate(input_ids=input_ids, **kwargs)
        uncached = model.generate(input_ids=input_ids, use_cache=False, **kwargs)
        torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), atol=1e-4, rtol=1e-4)


class Attention(LlamaAttention):
    """Llama's attention, which may call its attention function in other ways."""

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            projection(hidden_states).view(shape).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output = self.attend(attend, query, key, value, attention_mask)
        return self.o_proj(output.flatten(2)), None


class Twice(Attention):
    def attend(self, attend, query, key, value, mask):
        output, _ = attend(self, query, key, value, mask, scaling=self.scaling)
        return attend(self, query, key, output.transpose(1, 2), mask, scaling=self.scaling)[0]


class OnceForPrompts(Attention):
    def attend(self, attend, query, key, value, mask):
        output, _ = attend(self, query, key, value, mask, scaling=self.scaling)
        if query.shape[2] < 6:
            return output
        return output + attend(self, query, key, 2 * value, mask, scaling=self.scaling)[0]


class WithBias(Attention):
    def attend(self, attend, query, key, value, mask):
        bias = torch.zeros(1, 1, 1, key.shape[2])
        return attend(self, query, key, value, mask, scaling=self.scaling, position_bias=bias)[0]


class WithSlopes(Attention):
    def attend(self, attend, query, key, value, mask):
        slopes = torch.arange(key.shape[2], dtype=torch.float32)
        return attend(self, query, key, value, mask, scaling=self.scaling, alibi=slopes)[0]


class WithBiasInMask(Attention):
    def attend(self, attend, query, key, value, mask):
        bias = -0.1 * torch.arange(key.shape[2], dtype=torch.float32).expand(1, 1, query.shape[2], -1)
        bias = bias if mask is None else torch.where(mask, bias, -1e9) if mask.dtype == torch.bool else bias + mask
        return attend(self, query, key, value, bias, scaling=self.scaling)[0]


@pytest.mark.parametrize(
    "attention, message",
    [
        (Twice, "calls its attention function 2 times, but with keys or values that depend on the first call"),
        (OnceForPrompts, "calls its attention function 2 times, but fewer times for prompts"),
        (WithBias, r"passes position_bias of shape \(1, 1, 1, 3\) to its attention function"),
        (WithSlopes, r"passes alibi of shape \(3,\) to its attention function"),
        (WithBiasInMask, "passes a mask that does more than show or hide keys"),
    ],
)
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_refused(attention, message, attn):
    model = make_llava(attn=attn)
    for layer in model.model.language_model.layers:
        layer.self_attn.__class__ = attention
    input_ids = torch.randint(3, 90, (2, 6))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, :2] = 0
    model = adapt(model)
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match=f"'{PATH}' .*{message}.*exclude_modules="):
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
