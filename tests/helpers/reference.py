"""
Models and inputs of the reference cases: tensors computed by the official M2PT code at toy size, in `tests/reference`.

A case `v{Nv}_t{Nt}` has Nv visual and Nt textual prompts. Its files hold all weights, inputs, intermediate states, the
loss, gradients, and a greedy continuation.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel


FOLDER = Path(__file__).parents[1] / "reference"
OFFICIAL_IMAGE_TOKEN = -200

# Bounds for a float32 implementation, absolute, but for gradients relative to the tensor's largest element.
LOGITS = STATES = 1e-4
IMAGE_FEATURES = 5e-5
LOSS = 1e-5
GRADIENTS = 1e-4


@dataclass
class Case:
    facts: dict
    tensors: dict[str, torch.Tensor]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    @property
    def image_token(self) -> int:
        """An id that the case does not use: transformers marks image rows with ids of the vocabulary."""
        used = {*self["inputs.input_ids"].flatten().tolist(), *self["greedy.input_ids"].flatten().tolist()}
        return max(set(range(self.facts["llama"]["vocab_size"])) - used - set(self["greedy.tokens"].tolist()))

    def expand(self, ids: torch.Tensor, *others: tuple[torch.Tensor, int]) -> list[torch.Tensor]:
        """Puts as many image tokens as an image has rows where the official code has one. `others`: (tensor, fill)."""
        num_rows = self.facts["num_image_rows"]
        expanded = []
        for tensor, fill in [(ids, self.image_token), *others]:
            rows = []
            for row, row_ids in zip(tensor, ids):
                at = row_ids.tolist().index(OFFICIAL_IMAGE_TOKEN)
                rows.append(torch.cat([row[:at], row.new_full((num_rows,), fill), row[at + 1 :]]))
            expanded.append(torch.stack(rows))
        return expanded

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        ids, mask, labels = self.expand(
            self["inputs.input_ids"], (self["inputs.attention_mask"], 1), (self["inputs.labels"], -100)
        )
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": labels,
            "pixel_values": self["inputs.pixel_values"],
        }

    @property
    def greedy_inputs(self) -> dict[str, torch.Tensor]:
        (ids,) = self.expand(self["greedy.input_ids"])
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": self["greedy.pixel_values"],
        }

    def visual_prompts(self, prefix: str = "weights") -> list[torch.Tensor]:
        name = prefix + ".model.vision_tower.vision_tower.vision_model.encoder.prompts.{}"
        return self._numbered(name, self.facts["clip_vision"]["num_hidden_layers"])

    def textual_prompts(self, prefix: str = "weights") -> list[torch.Tensor]:
        return self._numbered(prefix + ".model.prompts.{}", self.facts["llama"]["num_hidden_layers"])

    def _numbered(self, name: str, count: int) -> list[torch.Tensor]:
        return [self.tensors[name.format(i)][0] for i in range(count) if name.format(i) in self.tensors]


def load_case(name: str) -> Case:
    return Case(json.loads((FOLDER / f"{name}.json").read_text()), load_file(FOLDER / f"{name}.safetensors"))


def make_model(case: Case, attn: str = "sdpa") -> PreTrainedModel:
    """The frozen model of a case, without prompts."""
    llama = {name: value for name, value in case.facts["llama"].items() if name not in ("pretraining_tp",)}
    llama.pop("rope_scaling")
    llama["rope_parameters"] = {"rope_type": "default", "rope_theta": llama.pop("rope_theta")}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**case.facts["clip_vision"]),
        text_config=LlamaConfig(**llama),
        image_token_index=case.image_token,
        vision_feature_layer=case.facts["mm_vision_select_layer"],
        # With prompts, the official code drops the first of them where it would drop the class token without.
        vision_feature_select_strategy="full" if case.facts["n_visual_prompts"] else "default",
        # The official projector is one linear layer; the second one becomes the identity.
        projector_hidden_act="linear",
        tie_word_embeddings=False,
    )
    config._attn_implementation = attn
    model = LlavaForConditionalGeneration(config).eval()
    weights = model.state_dict()
    loaded = set()
    for name, tensor in case.tensors.items():
        if name.startswith("weights.") and "prompts" not in name and "rotary_emb" not in name:
            key = _our_name(name.removeprefix("weights."))
            weights[key].copy_(tensor)
            loaded.add(key)
    projector = model.model.multi_modal_projector
    nn.init.eye_(projector.linear_2.weight)
    nn.init.zeros_(projector.linear_2.bias)
    left = {key for key in weights if "linear_2" not in key} - loaded
    assert not left, left
    return model


def _our_name(name: str) -> str:
    for official, ours in (
        ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower."),
        ("model.mm_projector.", "model.multi_modal_projector.linear_1."),
        ("lm_head.", "lm_head."),
        ("model.", "model.language_model."),
    ):
        if name.startswith(official):
            return ours + name.removeprefix(official)
    raise KeyError(name)
