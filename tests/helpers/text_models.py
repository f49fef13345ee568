"""Small language models without images, and batches of samples of several lengths for them."""

import torch
from peft import get_peft_model
from torch.nn.attention.flex_attention import create_block_mask
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DynamicCache,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    StaticCache,
)

from helpers.models import PAD_TOKEN, on_top_of, randomise
from peft_m2pt import M2PTConfig


TEXT = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "pad_token_id": PAD_TOKEN,
    "initializer_range": 0.2,
}
WINDOW = 4


def llama():
    return LlamaForCausalLM(LlamaConfig(**TEXT))


def mistral():
    return MistralForCausalLM(MistralConfig(**TEXT, sliding_window=WINDOW))


def qwen():
    """Positions with three axes."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 48, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2}
    config = Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope, "bos_token_id": 1, "eos_token_id": 2},
        vision_config=vision,
        image_token_id=98,
        video_token_id=97,
        vision_start_token_id=95,
        vision_end_token_id=96,
    )
    return Qwen2VLForConditionalGeneration(config)


MODELS = {"llama": llama, "mistral": mistral, "qwen": qwen}


def make(name="llama", attn="sdpa", **kwargs):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model.set_attn_implementation(attn)
    tuned = get_peft_model(model, M2PTConfig(num_visual_tokens=0, num_textual_tokens=3, **kwargs))
    randomise(tuned, seed=2)
    return tuned.eval()


def make_ids(*lengths, seed=4):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 90, (1, length), generator=generator) for length in lengths]


def pad(samples, sides):
    """Samples as a batch, with padding on the left, on the right, or half on each side."""
    length = max(sample.shape[1] for sample in samples)
    rows, masks = [], []
    for sample in samples:
        missing = length - sample.shape[1]
        left = {"left": missing, "right": 0, "both": missing // 2}[sides]
        widths = (left, missing - left)
        rows.append(torch.nn.functional.pad(sample, widths, value=PAD_TOKEN))
        masks.append(torch.nn.functional.pad(torch.ones_like(sample), widths))
    return torch.cat(rows), torch.cat(masks)


def causal(mask):
    """Which keys each token sees, of shape `(batch_size, 1, length, length)`."""
    length = mask.shape[1]
    return torch.ones(length, length, dtype=torch.bool).tril() & mask.bool()[:, None, None]


def blocks_of(visible):
    """The same in the form of flex attention."""
    batch_size, _, length, _ = visible.shape
    of_samples = visible[:, 0]

    def see(batch, head, query, key):
        return of_samples[batch, query, key]

    return create_block_mask(see, batch_size, None, length, length, device="cpu", BLOCK_SIZE=(8, 8))


def outputs(model, **inputs):
    output = model(**inputs)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=3e-5, rtol=1e-4)


def assert_as_alone(call, samples, together, mask):
    for sample, output, of_sample in zip(samples, together, mask):
        assert_close(output[of_sample.bool()], outputs(call, input_ids=sample, use_cache=False)[0])


PARTS = {
    "whole model": lambda model: model,
    "body": lambda model: model.get_base_model().base_model,
    "decoder": lambda model: model.get_base_model().get_decoder(),
}


def packed_mask(lengths, padding=0):
    """Several sequences in one row, the last of which stands behind padding."""
    of_tokens = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    of_tokens = torch.cat([of_tokens[: -lengths[-1]], torch.full((padding,), -1), of_tokens[-lengths[-1] :]])
    visible = (of_tokens[:, None] == of_tokens) & (of_tokens >= 0)
    return (visible & torch.ones_like(visible).tril())[None, None]


class CachesWithoutMasks:
    """Nothing but the positions tells where samples start, also of those behind a sliding window."""

    LENGTH = 14

    def inputs(self, name, *starts):
        ids = torch.cat(make_ids(*[self.LENGTH] * len(starts)))
        positions = torch.arange(self.LENGTH) + torch.tensor(starts)[:, None]
        return ids, positions.expand(3, -1, -1) if name == "qwen" else positions

    def feed(self, model, call, cache, inputs, *places):
        """The outputs for the tokens between each two of these places."""
        ids, positions = inputs
        parts = [
            outputs(call, input_ids=ids[:, a:b], position_ids=positions[..., a:b], **on_cache(model, cache))
            for a, b in zip(places, places[1:])
        ]
        return torch.cat(parts, dim=1)

    def start(self, name, is_static, *starts):
        model, inputs = make(name), self.inputs(name, *starts)
        cache = StaticCache(config=model.config, max_cache_len=20) if is_static else DynamicCache(config=model.config)
        self.feed(model, model, cache, inputs, 0, 6)
        return model, inputs, cache

    def check_emptied(self, name, is_static, compiled):
        """A single token that is fed next is the first one."""
        ids, positions = self.inputs(name, 9, 9)
        expected = outputs(make(name), input_ids=ids, position_ids=positions, use_cache=False)
        model, inputs, cache = self.start(name, is_static, 0, 0)
        call = compiled(model)
        self.feed(model, call, cache, inputs, 6, 7, 8)
        cache.reset() if is_static else cache.crop(-8)
        assert_close(self.feed(model, call, cache, (ids, positions), 0, 1, 2, 5, 6), expected[:, :6])


def on_cache(model, cache):
    return on_top_of(cache) if cache is None else {"use_cache": True, **on_top_of(cache)}


OTHER_TEXT = {
    # Complex rotations. Chunks of tokens that do not see each other, and layers without rotations.
    "llama4": lambda: Llama4ForCausalLM(
        Llama4TextConfig(
            **{**TEXT, "num_hidden_layers": 4},
            head_dim=12,
            intermediate_size_mlp=64,
            num_local_experts=2,
            num_experts_per_tok=1,
            attention_chunk_size=4,
        )
    ),
    "deepseek_v2": lambda: DeepseekV2ForCausalLM(
        DeepseekV2Config(
            **{**TEXT, "num_key_value_heads": 4},
            first_k_dense_replace=2,
            kv_lora_rank=16,
            q_lora_rank=None,
            qk_nope_head_dim=8,
            qk_rope_head_dim=8,
            v_head_dim=8,
        )
    ),
    # What is no rotation: a factor of all frequencies, which depends on the longest position.
    "yarn": lambda: LlamaForCausalLM(
        LlamaConfig(
            **TEXT,
            max_position_embeddings=64,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        )
    ),
}
