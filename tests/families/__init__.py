"""
Tiny models of the families of models that M2PT is tried on, filed by what is special about them.

Not here: fast_vlm and perception_lm, whose vision towers are models of timm, which is not installed; qwen2_5_omni and
qwen3_omni_moe as a whole, which have no forward pass: what is tuned is their thinker.

A tiny random model may generate the placeholder id, which a forward pass without a cache then counts as one more image
("features and tokens do not match"). Where that happened, the placeholder or the media are others.
"""

from . import (
    audio,
    encoder_decoder,
    encoders,
    hybrid,
    mrope,
    mrope_qwen,
    no_encoder,
    packed_vision,
    plain_vision,
    queries,
)


FAMILIES = [
    family
    for group in (
        plain_vision,
        packed_vision,
        mrope_qwen,
        mrope,
        hybrid,
        queries,
        encoder_decoder,
        no_encoder,
        audio,
        encoders,
    )
    for family in group.FAMILIES
]
