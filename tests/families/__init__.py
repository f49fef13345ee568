"""Tiny models of the families of models that M2PT is tried on."""

from . import (
    audio_and_a_to_g,
    glm_molmo_clip,
    h_to_p,
    llava_gemma_idefics,
    new_in_5_24,
    q_to_z_and_encoders,
    qwen_mllama_blip2,
    speech,
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
        new_in_5_24,
        speech,
    )
    for family in group.FAMILIES
]
