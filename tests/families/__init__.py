"""Tiny models of the families of models that M2PT is tried on."""

from . import (
    audio_and_a_to_g,
    glm_molmo_clip,
    h_to_p,
    llava_gemma_idefics,
    q_to_z_and_encoders,
    qwen_mllama_blip2,
)


FAMILIES = [
    family
    for group in (
        llava_gemma_idefics,
        qwen_mllama_blip2,
        glm_molmo_clip,
        audio_and_a_to_g,
        h_to_p,
        q_to_z_and_encoders,
    )
    for family in group.FAMILIES
]
