"""
What must hold for every family of models.

Each check takes a [`Tuned`] family and fails with an `AssertionError`. None of them knows anything of a family but
what its [`Family`] says.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
import transformers
from helpers.attention_kernels import KERNELS, stand_ins
from helpers.lengthened_attention import lengthened_output
from helpers.recomputed import recomputed
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from peft_m2pt import M2PTAttention, M2PTConfig
from peft_m2pt.anatomy.towers import find_tower
from peft_m2pt.tested import TESTED

from .document import NO_ROAD, UNTUNED_DIFFERS, documented_roads
from .spec import PAD, TEXT_IDS, VOCAB_SIZE, Family, Inputs, make_inputs, make_labels, make_model, take_sample


NUM_NEW_TOKENS = 4
# In float32. What passes through both towers gathers rounding errors.
TOLERANCE = 2e-4


class Tuned:
    """A family's tiny model with an adapter of large prompts, and what the checks need of it."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.attn = "eager" if "attention" in family.without else "sdpa"
        self.inputs = make_inputs(family)
        self.model = self.tune(self.attn)

    @cached_property
    def base(self) -> PreTrainedModel:
        # Frozen, since torch computes in another order where gradients are wanted.
        return make_model(self.family, self.attn).requires_grad_(False)

    def base_runs_with(self, attn: str) -> bool:
        """Whether transformers' own model runs with an attention implementation, and gives what it gives with sdpa."""
        try:
            outputs = self.outputs(make_model(self.family, attn).requires_grad_(False))
            for actual, expected in zip(outputs, self.outputs(self.base)):
                assert_close(actual, expected)
        except Exception:  # anything that may go wrong in somebody else's code
            return False
        return True

    def tune(self, attn: str) -> PeftModel:
        model = get_peft_model(make_model(self.family, attn), make_config(self.family))
        enlarge_prompts(model)
        return model

    @property
    def first_tokens(self) -> torch.Tensor | None:
        """Which token is the first one of each sample that is no padding. `None` where there is no text."""
        mask = self.inputs.get("attention_mask")
        return None if mask is None else mask.argmax(-1)

    def packed(self, inputs: Inputs) -> Inputs:
        """Inputs as the model takes them, which may write into them."""
        return self.family.pack({name: value.clone() for name, value in inputs.items()})

    def loss(self, model: nn.Module) -> torch.Tensor:
        """The model's own loss, or where it has none, a number in which every output counts."""
        output = model(**self.packed(self.inputs), **make_labels(self.family, self.inputs))
        if getattr(output, "loss", None) is not None:
            return output.loss
        # Not the squares alone, which say nothing of embeddings of length 1.
        outputs = [tensor.float().clamp(-100, 100) for tensor in _floats(output)]
        return sum((tensor + tensor.pow(2)).mean() for tensor in outputs)

    def outputs(self, model: nn.Module) -> list[torch.Tensor]:
        """What the model says of tokens that are no padding."""
        with torch.no_grad():
            output = model(**self.packed(self.inputs))
        mask = self.inputs.get("attention_mask")
        tensors = [output.logits] if getattr(output, "logits", None) is not None else list(_floats(output))
        if mask is None or tensors[0].shape[:2] != mask.shape:
            return tensors
        return [tensor[mask.bool()] if tensor.shape[:2] == mask.shape else tensor for tensor in tensors]

    def generate(self, model: nn.Module, inputs: Inputs, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """New tokens `(batch_size, length)`, and the logits that chose them `(batch_size, length, vocab_size)`."""
        output = model.generate(
            **self.packed(inputs),
            max_new_tokens=NUM_NEW_TOKENS,
            min_new_tokens=NUM_NEW_TOKENS,
            do_sample=False,
            # Placeholders of media would have to come with media.
            suppress_tokens=list(range(TEXT_IDS[1], VOCAB_SIZE)),
            output_logits=True,
            return_dict_in_generate=True,
            **kwargs,
        )
        return output.sequences[:, -NUM_NEW_TOKENS:], torch.stack(output.logits, dim=1)


def make_config(family: Family) -> M2PTConfig:
    """All that the family allows."""
    return M2PTConfig(
        num_visual_tokens=0 if "visual" in family.refused else 4,
        num_textual_tokens=0 if "textual" in family.refused else 3,
        num_interaction_tokens=2 if isinstance(family.connector, int) else 0,
        tune_connector=family.has_connector,
        init_prompts="xavier_uniform",
    )


@torch.no_grad()
def enlarge_prompts(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "m2pt_prompt" in name or "m2pt_interaction" in name:
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator))
        elif "m2pt_connector" in name:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def trained_by(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if "m2pt_" in name}


def check_training(tuned: Tuned) -> None:
    model = tuned.model
    model.zero_grad()
    tuned.loss(model).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("m2pt_" in name), name
        if "m2pt_prompt" in name or "m2pt_interaction" in name:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert parameter.grad.norm(dim=1).min() > 0, name
    of_connector = [parameter.grad for name, parameter in model.named_parameters() if "m2pt_connector" in name]
    assert all(gradient is None or gradient.isfinite().all() for gradient in of_connector)
    assert any(gradient is not None and gradient.any() for gradient in of_connector) == tuned.family.has_connector
    model.zero_grad()


def check_exact(tuned: Tuned) -> None:
    model = tuned.model if tuned.attn == "eager" else tuned.tune("eager")
    adapted = {path: module for path, module in model.named_modules() if isinstance(module, M2PTAttention)}
    assert adapted
    calls: dict[str, int] = dict.fromkeys(adapted, 0)

    def compare(path: str) -> Callable:
        def hook(module: M2PTAttention, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            calls[path] += 1
            expected = lengthened_output(model.get_base_model(), module, args, kwargs, trace, tuned.first_tokens)
            actual = output[0] if isinstance(output, tuple) else output
            mask = kwargs.get("attention_mask")
            if mask is not None and mask.dim() == 2:
                # Where a module makes its own mask, padding may not stand between prompts and tokens.
                actual, expected = actual[mask.bool().all(-1)], expected[mask.bool().all(-1)]
            scale = expected.abs().max()
            assert (actual - expected).abs().max() < 1e-5 * max(1, scale), path

        return hook

    handles = [m.register_forward_hook(compare(path), with_kwargs=True) for path, m in adapted.items()]
    try:
        with torch.no_grad(), traced(model) as trace:
            model(**tuned.packed(tuned.inputs))
    finally:
        for handle in handles:
            handle.remove()
    assert all(calls.values()), calls


@contextmanager
def traced(model: nn.Module) -> Iterator[list[tuple[nn.Module, tuple, dict[str, Any], Any]]]:
    """Writes down every call of a module: module, arguments and output, in the order in which they end."""
    trace: list[tuple[nn.Module, tuple, dict[str, Any], Any]] = []
    handles = [
        module.register_forward_hook(
            lambda module, args, kwargs, output: trace.append((module, args, kwargs, output)), with_kwargs=True
        )
        for module in model.modules()
        if not isinstance(module, M2PTAttention)
    ]
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


def check_generation(tuned: Tuned) -> None:
    with torch.no_grad():
        tokens, logits = tuned.generate(tuned.model, tuned.inputs)
        _, of_base = tuned.generate(tuned.base, tuned.inputs)
        uncached_tokens, uncached = tuned.generate(tuned.model, tuned.inputs, use_cache=False)
        with recomputed():
            _, expected = tuned.generate(tuned.model, tuned.inputs)
    assert (logits - of_base).abs().max() > 0.01, "the prompts have no influence"
    assert_close(logits, expected, "recomputed in every call", tolerance=1e-5)
    assert_close(logits, uncached)
    assert torch.equal(tokens, uncached_tokens)
    has_one_pass = tuned.family.text and not tuned.model.config.is_encoder_decoder
    if has_one_pass and "forcing" not in tuned.family.without:
        # The second sample is padded in the batch, and alone here.
        for index in (0,) if "padding" in tuned.family.without else (0, 1):
            assert_close(logits[index], forced_logits(tuned, index, tokens[index]), "teacher forcing")


@torch.no_grad()
def forced_logits(tuned: Tuned, index: int, tokens: torch.Tensor) -> torch.Tensor:
    """The logits before each of these tokens, from one forward pass over a sample alone and all of them."""
    sample = take_sample(tuned.family, tuned.inputs, index)
    input_ids = torch.cat([sample["input_ids"], tokens[None]], dim=1)
    media = {name: sample[name] for name in tuned.family.media(1)}
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **media}
    inputs.update(tuned.family.extra(inputs))
    # As in generation: a new token is of the type of the last one, and a Q-Former reads the text that was given.
    if "token_type_ids" in sample:
        types = sample["token_type_ids"]
        inputs["token_type_ids"] = torch.cat([types, types[:, -1:].expand(-1, len(tokens))], dim=1)
    inputs.update({name: value for name, value in sample.items() if name.startswith("qformer")})
    return tuned.model(**tuned.packed(inputs)).logits[0, -len(tokens) - 1 : -1]


def check_padding(tuned: Tuned) -> None:
    with torch.no_grad():
        together = tuned.model(**tuned.packed(tuned.inputs))
        generated = tuned.generate(tuned.model, tuned.inputs)[1] if tuned.family.generates else None
        for index in (0, 1):
            sample = take_sample(tuned.family, tuned.inputs, index)
            alone = tuned.model(**tuned.packed(sample))
            for name in ("logits", "embeddings", "text_embeds", "image_embeds", "last_hidden_state"):
                if getattr(together, name, None) is not None:
                    of_sample = together[name][index]
                    length = len(alone[name][0])
                    assert_close(of_sample[-length:], alone[name][0], name)
            if generated is not None:
                assert_close(generated[index], tuned.generate(tuned.model, sample)[1][0], "generation")


def measure_roads(tuned: Tuned) -> dict[str, str]:
    """
    On each road to the language model, a sample that is padded on the left gives what it gives alone.

    Returns:
        `dict[str, str]`: By road: "yes", or why it says nothing of the tuned model, as the untuned one shows.
    """
    result = {}
    for road, run in ROADS.items():
        try:
            padded, alone = (run(tuned, tuned.base, is_alone) for is_alone in (False, True))
        except Exception:  # anything that may go wrong in somebody else's code
            result[road] = NO_ROAD
            continue
        if not are_close(padded, alone):
            result[road] = UNTUNED_DIFFERS
            continue
        padded, alone = (run(tuned, tuned.model, is_alone) for is_alone in (False, True))
        assert_close(padded, alone, road)
        assert not are_close(alone, run(tuned, tuned.base, True)), "the prompts have no influence"
        result[road] = "yes"
    return result


def check_roads(tuned: Tuned) -> None:
    measured = measure_roads(tuned)
    if transformers.__version__ == TESTED["transformers"].newest:
        assert documented_roads()[tuned.family.name] == measured, "docs/models.md is out of date: run `make models`"


def _run(module: nn.Module, inputs: Inputs, shape: torch.Size, num_tokens: int) -> torch.Tensor:
    """What a module says of the last tokens of the last sample."""
    with torch.no_grad():
        output = module(**inputs)
    states = [output.logits] if getattr(output, "logits", None) is not None else _floats(output)
    return next(tensor for tensor in states if tensor.shape[:2] == shape)[-1, -num_tokens:]


def _text(tuned: Tuned, is_alone: bool) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Ids and mask of two samples of text, of which the second one is shorter, or of that alone; and its length."""
    ids = torch.randint(*TEXT_IDS, (2, 12), generator=torch.Generator().manual_seed(6))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    ids = ids.masked_fill(mask == 0, PAD)
    return (ids[1:, 3:], mask[1:, 3:], 9) if is_alone else (ids, mask, 9)


def _untuned(model: nn.Module) -> nn.Module:
    """A model without what PEFT has put around it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _through_text(tuned: Tuned, model: nn.Module, is_alone: bool) -> torch.Tensor:
    ids, mask, length = _text(tuned, is_alone)
    return _run(model, {"input_ids": ids, "attention_mask": mask}, ids.shape, length)


def _through_body(tuned: Tuned, model: nn.Module, is_alone: bool) -> torch.Tensor:
    inputs = take_sample(tuned.family, tuned.inputs, 1) if is_alone else tuned.inputs
    length = int(tuned.inputs["attention_mask"][1].sum())
    body = _untuned(model).base_model
    return _run(body, tuned.packed(inputs), inputs["input_ids"].shape, length)


def _through_decoder(
    tuned: Tuned, model: nn.Module, is_alone: bool, of_mask: Callable[[torch.Tensor], Inputs] = lambda mask: {}
) -> torch.Tensor:
    ids, mask, length = _text(tuned, is_alone)
    _, decoder = find_tower(_untuned(model), "textual", make_config(tuned.family))
    return _run(decoder, {"input_ids": ids, "attention_mask": mask, **of_mask(mask)}, ids.shape, length)


def _wide_mask(mask: torch.Tensor) -> Inputs:
    visible = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool).tril() & mask.bool()[:, None, None]
    return {"attention_mask": torch.zeros(()).masked_fill(~visible, torch.finfo(torch.float32).min)}


def _positions(mask: torch.Tensor) -> Inputs:
    starts = 0 if len(mask) == 1 else torch.tensor([[5], [20]])
    return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0) + starts}


ROADS = {
    "text": _through_text,
    "body": _through_body,
    "decoder": _through_decoder,
    "4-D mask": functools.partial(_through_decoder, of_mask=_wide_mask),
    "positions": functools.partial(_through_decoder, of_mask=_positions),
}


def check_checkpointing(tuned: Tuned) -> None:
    model = copy.deepcopy(tuned.model).train()
    without_chance(model)
    losses, gradients = [], []
    for use_reentrant in (None, False, True):
        if use_reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(0)
        model.zero_grad()
        loss = tuned.loss(model)
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: parameter.grad for name, parameter in trained_by(model).items()})
    for kind, loss, of_parameters in zip(("not reentrant", "reentrant"), losses[1:], gradients[1:]):
        assert_close(loss, losses[0], f"{kind}: loss")
        for name, gradient in of_parameters.items():
            if gradients[0][name] is not None:
                assert gradient is not None, f"{kind}: {name}"
                assert_close(gradient, gradients[0][name], f"{kind}: {name}")


def without_chance(model: nn.Module) -> None:
    """Switches dropout off, which is of a training step but not of its result."""
    for module in model.modules():
        for name in (
            "p",
            "dropout",
            "dropout_prob",
            "attention_dropout",
            "activation_dropout",
            "drop_prob",
            "layerdrop",
        ):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def check_saving(tuned: Tuned) -> None:
    model = copy.deepcopy(tuned.model)
    expected, of_base = tuned.outputs(model), tuned.outputs(tuned.base)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(make_model(tuned.family, tuned.attn), folder, is_trainable=True)
    assert_equal(tuned.outputs(loaded), expected)
    with model.disable_adapter():
        assert_equal(tuned.outputs(model), of_base)
    assert_equal(tuned.outputs(model), expected)
    unloaded = model.unload()
    assert_equal(tuned.outputs(unloaded), of_base)
    of_base_weights = tuned.base.state_dict()
    assert unloaded.state_dict().keys() == of_base_weights.keys()
    assert all(torch.equal(weight, of_base_weights[name]) for name, weight in unloaded.state_dict().items())


def check_attention(tuned: Tuned) -> None:
    expected = tuned.outputs(tuned.model)
    with stand_ins():
        for attn in ("eager", *(attn for attn in KERNELS if tuned.base_runs_with(attn))):
            for actual, of_sdpa in zip(tuned.outputs(tuned.tune(attn)), expected):
                assert_close(actual, of_sdpa, attn)


def are_close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    try:
        assert_close(actual, expected)
    except AssertionError:
        return False
    return True


def assert_close(actual: torch.Tensor, expected: torch.Tensor, what: str = "", tolerance: float = TOLERANCE) -> None:
    assert actual.shape == expected.shape, what
    # Scores of tokens that cannot come are the most negative number.
    actual, expected = actual.clamp(-1e4, 1e4), expected.clamp(-1e4, 1e4)
    difference = (actual - expected).abs().max()
    scale = max(1.0, expected[expected.abs() < 1e4].abs().max().item())
    assert difference <= tolerance * scale, f"{what} differs by {difference:.1e} (values up to {scale:.1f})"


def assert_equal(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def _floats(output: Any) -> Iterator[torch.Tensor]:
    values = output.values() if hasattr(output, "values") else output if isinstance(output, (tuple, list)) else ()
    for value in values:
        if isinstance(value, torch.Tensor):
            if value.is_floating_point():
                yield value
        elif not hasattr(value, "update"):  # no caches
            yield from _floats(value)
