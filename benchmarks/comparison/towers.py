"""A LLaVA of pretrained towers that is small enough to train on a CPU: SmolLM2-135M and a DINOv2-derived encoder."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Dinov2Config,
    Dinov2Model,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
)

from .tasks import Template


SIZE, PATCH = 56, 14
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
TEMPLATE = Template("<|im_start|>user\n", "\n{}<|im_end|>\n<|im_start|>assistant\n", "{}<|im_end|>")


def normalize(images: torch.Tensor) -> torch.Tensor:
    """Images `(number, 3, SIZE, SIZE)` with values of 0 to 1, as the encoder takes them."""
    return (images - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)


def pretrained(packages: Path) -> tuple[LlavaForConditionalGeneration, PreTrainedTokenizerBase]:
    """The towers with an untrained connector between them, all frozen, and the tokenizer."""
    language, tokenizer = _language_model(packages)
    return _put_together(language, _vision_encoder(packages), tokenizer), tokenizer


def _language_model(packages: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    file = next(packages.rglob("*.gguf"))
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    loaded.config.tie_word_embeddings = True
    # What was read from GGUF cannot be saved again.
    model = LlamaForCausalLM(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return model, tokenizer


def _vision_encoder(packages: Path) -> Dinov2Model:
    """Reads the weights of the encoder out of an ONNX file, in which some of them are constants without a name."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(next(packages.rglob("vit_s_focus.onnx"))).graph
    constants = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}
    prefix = "backbone."
    weights = {name.removeprefix(prefix): value for name, value in constants.items() if name.startswith(prefix)}
    # Matrices of linear layers are transposed, and named by the bias that is added next.
    factors = {n.output[0]: next((i for i in n.input if i.startswith("onnx::MatMul")), None) for n in graph.node}
    for node in graph.node:
        bias = next((i for i in node.input if i.startswith(prefix) and i.endswith(".bias")), None)
        factor = next((factors[i] for i in node.input if factors.get(i)), None)
        if node.op_type == "Add" and bias and factor:
            weights[bias.removeprefix(prefix).removesuffix("bias") + "weight"] = constants[factor].T.contiguous()
    for_class, for_grid = (
        next(value for name, value in constants.items() if name.startswith(start) and value.shape == (1, length, 384))
        for start, length in (("onnx::Concat", 1), ("onnx::Reshape", 37**2))
    )
    weights["embeddings.position_embeddings"] = torch.cat([for_class, for_grid], dim=1)
    model = Dinov2Model(
        Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=PATCH)
    )
    weights["embeddings.mask_token"] = model.embeddings.mask_token.detach()
    wanted = model.state_dict()
    model.load_state_dict({_name_in_transformers(name, wanted): value for name, value in weights.items()})
    return model


def _name_in_transformers(name: str, wanted: dict[str, torch.Tensor]) -> str:
    renames = {
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
        "encoder.layer.": "layers.",
    }
    for old, new in renames.items():
        if name not in wanted:
            name = name.replace(old, new)
    return name


def _put_together(
    language: LlamaForCausalLM, vision: Dinov2Model, tokenizer: PreTrainedTokenizerBase
) -> LlavaForConditionalGeneration:
    config = LlavaConfig(
        vision_config=vision.config,
        text_config=language.config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIZE // PATCH) ** 2,
        # Training for saliency has altered the last layers: what is in an image is best read off before them.
        vision_feature_layer=-3,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(vision.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    return model.requires_grad_(False).eval()
