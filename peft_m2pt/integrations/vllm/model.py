"""The models that vLLM runs for bundles: those of its Transformers backend, with prompts."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import vllm
from vllm.config import VllmConfig
from vllm.model_executor.models.transformers import (
    MultiModalDummyInputsBuilder,
    MultiModalProcessingInfo,
    MultiModalProcessor,
    TransformersForCausalLM,
    TransformersMultiModalForCausalLM,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec

from ...bundles.bundler import ROWS_PREFIX
from ...errors import UnsupportedModelError
from ...register import PREFIX
from ...saving.names import WRAPPER_PREFIX
from .parts import make_tuned_model, put_into
from .requests import moved
from .settings import Settings


class M2PTMixin:
    """
    Puts the prompts of a bundle into a model of vLLM's Transformers backend.

    The first n tokens of each request are placeholders for the textual prompts. They get the positions -n ... -1, and
    in front of each layer its prompts take the place of their hidden states.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        settings = Settings.of(vllm_config)
        if settings is None:
            raise UnsupportedModelError(
                f"vLLM {vllm.__version__} was not tried with M2PT, and did not call its checks. Install a version "
                f"that was tried (docs/serving.md), or try a newer peft-m2pt."
            )
        self.num_prompts = settings.num_prompts
        # For each token of a batch, which prompt it stands for, or n. In a buffer, since some models tell their layers
        # no positions, and since CUDA graphs read from the same memory each time.
        max_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        device = vllm_config.device_config.device
        self.places = torch.full([max_tokens], self.num_prompts, device=device)
        tuned = make_tuned_model(vllm_config.model_config, Path(settings.bundle))
        put_into(self.model, tuned, self.places, self.init_parameters)

    def _create_hf_to_vllm_mapper(self) -> None:
        # vLLM also looks up here how transformers renames weights.
        with _original_architectures(self.config):
            super()._create_hf_to_vllm_mapper()

    def forward(self, input_ids: Any, positions: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.num_prompts > 0:
            if positions.dim() == 1:
                positions = positions - self.num_prompts
            text_positions = positions if positions.dim() == 1 else positions[0]
            places = (text_positions + self.num_prompts).clamp(0, self.num_prompts)
            self.places[: len(places)].copy_(places)
        return super().forward(input_ids, positions, *args, **kwargs)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        # Those of the adapter are there already.
        own = (item for item in weights if not item[0].startswith((WRAPPER_PREFIX, ROWS_PREFIX)))
        return super().load_weights(own) | {name for name, _ in self.named_parameters() if f".{PREFIX}" in name}


@contextmanager
def _original_architectures(config: Any) -> Generator[None]:
    served, config.architectures = config.architectures, config.m2pt_architectures
    try:
        yield
    finally:
        config.architectures = served


class M2PTForCausalLM(M2PTMixin, TransformersForCausalLM):
    """A language model alone."""


@MULTIMODAL_REGISTRY.register_processor(
    MultiModalProcessor,
    info=MultiModalProcessingInfo,
    dummy_inputs=MultiModalDummyInputsBuilder,
)
class M2PTForMultiModalLM(M2PTMixin, TransformersMultiModalForCausalLM):
    """A language model that takes images."""

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]
    ) -> tuple[torch.Tensor, int]:
        num_prompts = self.num_prompts
        features = moved(mm_features, -num_prompts)
        positions, delta = super().get_mrope_input_positions(input_tokens[num_prompts:], features)
        of_prompts = torch.arange(-num_prompts, 0).to(positions).expand(len(positions), -1)
        return torch.cat([of_prompts, positions], dim=1), delta - num_prompts
