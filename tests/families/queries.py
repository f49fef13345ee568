"""Queries of their own stand between encoder and language model: a Q-Former, a resampler."""

import torch
import transformers as tr

from . import reasons
from .parts import (
    AROUND,
    ENCODER,
    FAKE_TOKEN,
    IDS,
    SPECIAL,
    TEXT,
    VISION,
    VISION_END,
    VISION_START,
    flattened_patches,
    mm_token_types,
    pixels,
    text_sizes,
    vit_sizes,
)
from .spec import BOS, EOS, MEDIA_TOKEN, PAD, VOCAB_SIZE, Family, seeded


def idefics2():
    return tr.Idefics2Config(
        vision_config={**VISION, "patch_size": 4},
        perceiver_config={
            "hidden_size": 48,
            "resampler_n_latents": 4,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 12,
            "num_key_value_heads": 2,
        },
        text_config=tr.MistralConfig(**TEXT, sliding_window=12),
        image_token_id=MEDIA_TOKEN,
    )


def pixels_with_margin(n):
    """An image of 16 x 12 pixels, padded to 16 x 16."""
    mask = torch.ones(n, 1, 16, 16, dtype=torch.long)
    mask[..., 12:] = 0
    return {"pixel_values": seeded(n, 1, 3, 16, 16) * mask[:, :, None], "pixel_attention_mask": mask}


def qformer_sizes():
    # cross-attention in the first of the two layers
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 32,
        "cross_attention_frequency": 2,
    }


def blip2():
    return tr.Blip2Config(
        vision_config=tr.Blip2VisionConfig(**vit_sizes(patch_size=8)),
        qformer_config=tr.Blip2QFormerConfig(**qformer_sizes()),
        text_config=tr.OPTConfig(
            hidden_size=48,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=VOCAB_SIZE,
            max_position_embeddings=128,
            word_embed_proj_dim=48,
            **SPECIAL,
        ),
        num_query_tokens=4,
        image_token_index=MEDIA_TOKEN,
    )


def instructblip():
    return tr.InstructBlipConfig(
        vision_config=tr.InstructBlipVisionConfig(**vit_sizes(patch_size=8)),
        qformer_config=tr.InstructBlipQFormerConfig(**qformer_sizes()),
        text_config=tr.LlamaConfig(**text_sizes()),
        num_query_tokens=4,
        image_token_index=MEDIA_TOKEN,
    )


def images_and_instructions(number):
    """The Q-Former reads the instruction too, in its own tokens, padded on the right (every second one is shorter)."""
    instructions = torch.randint(3, 80, (number, 5), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(instructions)
    mask[1::2, 3:] = 0
    return {**pixels(number), "qformer_input_ids": instructions * mask, "qformer_attention_mask": mask}


ARIA_IMAGE = 97  # 98 is what the random model happens to generate: without a cache that is one more placeholder


def aria():
    return tr.AriaConfig(
        vision_config=tr.Idefics3VisionConfig(**ENCODER, image_size=16, patch_size=4),
        text_config=tr.AriaTextConfig(**TEXT, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=2),
        projector_patch_to_query_dict={16: 4},
        image_token_index=ARIA_IMAGE,
    )


def aria_media(n: int) -> dict[str, torch.Tensor]:
    pixel_mask = torch.ones(n, 16, 16, dtype=torch.bool)
    pixel_mask[:, 12:] = False  # the processor pads an image to a square: the lowest row of patches is padding
    return {**pixels(n), "pixel_mask": pixel_mask}


def kosmos2():
    return tr.Kosmos2Config(
        vision_config=tr.Kosmos2VisionConfig(**ENCODER, image_size=16, patch_size=8),
        text_config=tr.Kosmos2TextConfig(
            embed_dim=48,
            layers=2,
            ffn_dim=64,
            attention_heads=4,
            max_position_embeddings=128,
            **IDS,
        ),
        latent_query_num=4,
    )


def molmo2():
    return tr.Molmo2Config(
        vision_config=dict(
            **ENCODER,
            num_key_value_heads=4,
            head_dim=8,
            image_size=[16, 16],
            patch_size=4,
        ),
        adapter_config={
            "vision_feature_layer": [1, 0],
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "intermediate_size": 48,
            "text_hidden_size": 48,
        },
        text_config={
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "vocab_size": VOCAB_SIZE,
            "additional_vocab_size": 4,
            "max_position_embeddings": 128,
        },
        image_patch_id=MEDIA_TOKEN,
        image_start_token_id=VISION_START,
        image_end_token_id=VISION_END,
        low_res_image_start_token_id=92,
        frame_start_token_id=93,
        frame_end_token_id=94,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def molmo2_pack(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The patches to pool are counted through the whole batch."""
    num_images = len(inputs["image_grids"])
    num_patches = inputs["pixel_values"].shape[:2].numel() // num_images
    pooling = inputs["image_token_pooling"]
    first = num_patches * torch.arange(num_images).repeat_interleave(len(pooling) // num_images)[:, None]
    return {**inputs, "image_token_pooling": torch.where(pooling >= 0, pooling + first, -1)}


def molmo2_media(n: int) -> dict[str, torch.Tensor]:
    """The whole image as 2 x 2 tokens of 2 x 2 patches, then one crop of it of 2 x 1 tokens, one with a patch less."""
    whole = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    crop = [[16, 17, 20, 21], [24, 25, 28, -1]]
    return {
        "pixel_values": seeded(n * 2, 16, 3 * 4 * 4),
        "image_token_pooling": torch.tensor([whole + crop] * n).flatten(0, 1),
        "image_grids": torch.tensor([[2, 2, 2, 1]] * n),
        "image_num_crops": torch.tensor([2] * n),
    }


def granite4_vision():
    return tr.Granite4VisionConfig(
        vision_config=tr.SiglipVisionConfig(
            hidden_size=128,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=32,
            patch_size=4,
            vision_use_head=False,
        ),
        qformer_config={
            "model_type": "blip_2_qformer",
            "num_hidden_layers": 1,
            "intermediate_size": 64,
            "cross_attention_frequency": 1,
            "use_qformer_text_input": False,
            "max_position_embeddings": 64,
        },
        text_config=dict(
            **TEXT | {"num_hidden_layers": 6},
            embedding_multiplier=3.0,
            attention_multiplier=0.25,
            residual_multiplier=0.5,
            logits_scaling=2.0,
        ),
        image_token_index=MEDIA_TOKEN,
        vision_feature_select_strategy="full",
        downsample_rate="2/4",
        deepstack_layer_map=[[-3, 0], [-2, 1]],
        spatial_target_layers=[2, 3, 4, 5],
        projector_dropout=0.0,
        image_grid_pinpoints=[[32, 32], [32, 64], [64, 32]],
    )


def instructblipvideo():
    return tr.InstructBlipVideoConfig(
        vision_config=tr.InstructBlipVideoVisionConfig(**ENCODER, image_size=16, patch_size=8),
        qformer_config=tr.InstructBlipVideoQFormerConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        text_config=tr.LlamaConfig(**TEXT),
        num_query_tokens=3,
        video_token_index=MEDIA_TOKEN,
    )


def qformer_text(inputs):
    ids = inputs["input_ids"][:, -4:]  # the instruction, for the Q-Former too
    return {"qformer_input_ids": ids, "qformer_attention_mask": torch.ones_like(ids)}


def kosmos2_5():
    return tr.Kosmos2_5Config(
        vision_config=tr.Kosmos2_5VisionConfig(**ENCODER, head_dim=8, patch_embed_hidden_size=48, max_num_patches=8),
        text_config=tr.Kosmos2_5TextConfig(
            **IDS, embed_dim=48, layers=2, ffn_dim=64, attention_heads=4, max_position_embeddings=64, dropout=0.0
        ),
        latent_query_num=5,
    )


FAMILIES = [
    Family(
        "idefics2",
        "Idefics2ForConditionalGeneration",
        idefics2,
        media=pixels_with_margin,
        num_media_tokens=4,
        before=(FAKE_TOKEN,),
        after=(FAKE_TOKEN,),
        connector=reasons.RESAMPLER,
    ),
    Family(
        "blip-2",
        "Blip2ForConditionalGeneration",
        blip2,
        pixels,
        4,
        connector=reasons.QFORMER,
        has_connector=False,
        since="5.23",
    ),
    # no gradient in the MLP for text in the Q-Former's last layer: its outputs at the text are thrown away
    Family(
        "instructblip",
        "InstructBlipForConditionalGeneration",
        instructblip,
        images_and_instructions,
        4,
        connector=reasons.QFORMER,
        has_connector=False,
        since="5.23",
    ),
    # The features are those in front of the vision tower's last norm, which gets no gradient.
    Family(
        "aria",
        "AriaForConditionalGeneration",
        aria,
        aria_media,
        num_media_tokens=4,
        media_token=ARIA_IMAGE,
        connector=reasons.RESAMPLER,
    ),
    Family(
        "kosmos-2",
        "Kosmos2ForConditionalGeneration",
        kosmos2,
        pixels,
        num_media_tokens=4,
        **AROUND,
        extra=lambda inputs: {"image_embeds_position_mask": inputs["input_ids"] == MEDIA_TOKEN},
        connector=reasons.RESAMPLER_BETWEEN,
        has_connector=False,
        without={
            "checkpointing": reasons.IN_PLACE,
            "generation": reasons.UNTUNED_CACHE,
            "padding": reasons.UNTUNED_PADDING,
        },
        since="5.23",
    ),
    # All image tokens of a row see one another, also those that come later (mm_token_type_ids).
    Family(
        "molmo2",
        "Molmo2ForConditionalGeneration",
        molmo2,
        molmo2_media,
        num_media_tokens=6,
        pack=molmo2_pack,
        **AROUND,
        extra=mm_token_types,
        connector=reasons.RESAMPLER,
    ),
    # image features enter layers 0-5 (placeholders start as zeros), hidden_states skip the tower's post_layernorm;
    # the Q-Former's heads are 64 wide, hence the size;
    # the whole image and one tile of it, 4x4 tokens each, the tile's rows with a newline each
    Family(
        "granite4_vision",
        "Granite4VisionForConditionalGeneration",
        granite4_vision,
        num_media_tokens=36,
        media=lambda n: {"pixel_values": seeded(n, 2, 3, 32, 32), "image_sizes": torch.tensor([[32, 32]] * n)},
        connector=reasons.QFORMER,
        has_connector=False,
        since="5.23",
    ),
    # no gradient in the last Q-Former layer's feed-forward for text, whose output is dropped
    Family(
        "instructblipvideo",
        "InstructBlipVideoForConditionalGeneration",
        instructblipvideo,
        media=lambda n: {"pixel_values": seeded(n, 2, 3, 16, 16)},
        num_media_tokens=6,
        extra=qformer_text,
        connector=reasons.QFORMER,
        has_connector=False,
        since="5.23",
    ),
    # the vision tower's attention is always eager: it looks its function up with getattr, not by key
    Family(
        "kosmos-2.5",
        "Kosmos2_5ForConditionalGeneration",
        kosmos2_5,
        num_media_tokens=5,
        before=(96,),
        after=(95,),
        media=lambda n: {"flattened_patches": flattened_patches(n)},
        extra=lambda inputs: {"image_embeds_position_mask": (inputs["input_ids"] == MEDIA_TOKEN).long()},
        connector=reasons.RESAMPLER_BETWEEN,
        has_connector=False,
        refused={"visual": reasons.BYPASSES},
        without={
            "generation": reasons.UNTUNED_CACHE,
            "padding": reasons.UNTUNED_PADDING,
        },
    ),
]
