"""
The states that a model has in front of each attention when it reads a text, or looks at an image.

Prompts that start as the states of a text leave a language model as it is behind that text.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.utils.integrations import gather_params_ctx
from torch import nn

from .anatomy import Site
from .arguments import read_signature
from .base import M2PTLayer
from .blank import blank_arguments
from .config import M2PTConfig
from .errors import UnsupportedModelError
from .graft import is_linear
from .tokens import write_text
from .towers import find_tower
from .upstream import offloaded_to
from .wrappers import training_wrappers


def states_of_text(
    model: nn.Module, config: M2PTConfig, sites: Sequence[Site], token_ids: Sequence[int] | None
) -> dict[str, torch.Tensor]:
    """
    Lets the language model read a text, from position 0 on and without prompts.

    Args:
        model (`transformers.PreTrainedModel`):
            The model. It is afterwards as it was.
        config ([`M2PTConfig`]):
            May name the language model.
        sites (`Sequence[Site]`):
            Attention modules of the language model.
        token_ids (`Sequence[int]`, *optional*):
            The text. `None` for one that the model writes, of `config.num_textual_tokens` tokens.

    Returns:
        `dict[str, torch.Tensor]`: For the path of each site what stands in front of its norm, of shape `[n, D]`, for n
        tokens. Where a layer is called several times, that of the first call.

    Raises:
        UnsupportedModelError: If the language model cannot read a text by itself, or write one.
    """
    path, decoder = find_tower(model, "textual", config)
    what = f"the language model '{path}' ({type(decoder).__name__})"
    configs = (getattr(decoder, "config", None), getattr(model, "config", None))
    if any(getattr(config, "is_encoder_decoder", False) for config in configs):
        raise UnsupportedModelError(
            f"{what} belongs to an encoder and a decoder, for which a text in front of both means nothing."
        )
    names = inspect.signature(type(decoder).forward).parameters
    if "input_ids" not in names:
        raise UnsupportedModelError(f"{what} takes no input_ids, so it cannot read a text by itself.")
    arguments = {"use_cache": False} if "use_cache" in names else {}
    device = _place_of(decoder)[0]

    def read(token_ids: Sequence[int]) -> Any:
        return decoder(input_ids=torch.tensor([list(token_ids)], device=device), **arguments)

    try:
        with _at_rest(model, decoder):
            if token_ids is None:
                token_ids = write_text(model, decoder, read, config.num_textual_tokens)
            states = _observe(sites, lambda: read(token_ids))
    except Exception as error:  # anything that may go wrong in somebody else's code
        raise UnsupportedModelError(f"{what} cannot read a text by itself: {error}") from error
    for site in sites:
        found = states.get(site.path)
        if found is None or tuple(found.shape) != (len(token_ids), site.width):
            shape = "none" if found is None else f"states of shape {list(found.shape)}"
            raise UnsupportedModelError(
                f"{what} gave {shape} for a text of {len(token_ids)} tokens at '{site.path}', of width {site.width}."
            )
        if not found.isfinite().all():
            raise UnsupportedModelError(f"{what} has states that are not finite at '{site.path}', in {found.dtype}.")
    return states


def states_of_images(
    model: nn.Module, config: M2PTConfig, sites: Sequence[Site], num_tokens: int
) -> dict[str, torch.Tensor]:
    """
    Lets the vision encoder look at an image of zeros, which is the mean of all images, and where that has too few
    tokens, at images of noise beside it.

    Args:
        model (`transformers.PreTrainedModel`):
            The model. It is afterwards as it was.
        config ([`M2PTConfig`]):
            May name the vision encoder.
        sites (`Sequence[Site]`):
            Attention modules of the vision encoder.
        num_tokens (`int`):
            How many states of each site are wanted.

    Returns:
        `dict[str, torch.Tensor]`: For the path of each site the first states in front of its norm, `[num_tokens, D]`:
        those of the class token, if there is one, and of patches.

    Raises:
        UnsupportedModelError: If it is not known how an image is given to the encoder.
    """
    path, tower = find_tower(model, "visual", config)
    what = f"the vision encoder '{path}' ({type(tower).__name__})"

    def look(num_images: int) -> dict[str, torch.Tensor]:
        device, dtype = _place_of(tower)
        error: Exception | None = None
        for arguments in blank_arguments(tower, num_tokens, num_images):
            arguments = {
                name: value.to(device, dtype if value.is_floating_point() else None)
                for name, value in arguments.items()
            }
            try:
                with _at_rest(model, tower):
                    return _observe(sites, lambda: tower(**arguments))  # noqa: B023
            except Exception as reason:  # anything that may go wrong in somebody else's code
                error = error or reason
        why = "it is not known how an image is given to" if error is None else "an image alone is not enough for"
        raise UnsupportedModelError(f"{why} {what}{'' if error is None else f': {error}'}.") from error

    states = look(1)
    fewest = min((len(states.get(site.path, ())) for site in sites), default=0)
    if 0 < fewest < num_tokens:
        states = look(math.ceil(num_tokens / fewest))
    for site in sites:
        found = states.get(site.path)
        if found is None or found.shape[-1] != site.width or len(found) < num_tokens:
            shape = "no states" if found is None else f"states of shape {list(found.shape)}"
            raise UnsupportedModelError(
                f"{what} has {shape} of images at '{site.path}', and {num_tokens} of width {site.width} are wanted."
            )
        if not found.isfinite().all():
            raise UnsupportedModelError(f"{what} has states that are not finite at '{site.path}', in {found.dtype}.")
    return {path: found[:num_tokens] for path, found in states.items()}


def has_data(model: nn.Module) -> bool:
    """Whether a model has weights that can be computed with, in memory or offloaded."""
    return _place_of(model)[0].type != "meta"


def _place_of(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a module computes, and in which precision."""
    for holder in module.modules():
        for parameter in holder.parameters(recurse=False):
            if parameter.is_floating_point():
                return offloaded_to(holder) or parameter.device, parameter.dtype
    return torch.device("cpu"), torch.get_default_dtype()


def _observe(sites: Sequence[Site], run: Callable[[], Any]) -> dict[str, torch.Tensor]:
    """Runs a tower and returns what was in front of each site in its first call."""
    states: dict[str, torch.Tensor] = {}

    def observe(path: str, hidden_states: torch.Tensor) -> None:
        if path not in states:
            # A copy, since layers may write into their input.
            states[path] = hidden_states.detach().flatten(0, -2).clone()

    with ExitStack() as stack:
        for site in sites:
            handle = _watch(site, observe)
            stack.callback(handle.remove)
        run()
    return states


def _watch(site: Site, observe: Callable[[str, torch.Tensor], None]) -> torch.utils.hooks.RemovableHandle:
    """Shows a function what stands in front of an attention: the input of its norm or, without one, its own."""
    if site.norms:

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            observe(site.path, args[0] if args else next(iter(kwargs.values())))

        return getattr(site.block, site.norms[0]).register_forward_pre_hook(before, with_kwargs=True)

    signature = read_signature(type(site.attention))

    def before_attention(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        observe(site.path, signature.bind(args, kwargs)[signature.input_name])

    return site.attention.register_forward_pre_hook(before_attention, with_kwargs=True)


@contextmanager
def _at_rest(model: nn.Module, tower: nn.Module) -> Iterator[None]:
    """A tower without dropout and without the prompts that the model has already. Nothing of this is left behind."""
    training = [(module, module.training) for module in tower.modules()]
    layers = [module for module in model.modules() if isinstance(module, M2PTLayer)]
    names = {name for layer in layers for name in layer._get_available_adapters()}
    # What M2PT adapters have trained belongs to their prompts; what others have trained, to the model below.
    layers += [wrapper for wrapper in training_wrappers(model) if names.issuperset(wrapper.active_adapters)]
    disabled = [layer._disable_adapters for layer in layers]
    device = _place_of(tower)[0]
    devices = [device] if device.type == "cuda" else []
    try:
        for module, _ in training:
            # bitsandbytes packs weights on CPUs as inference wants them, in the first call that is not of training.
            module.training = is_linear(module)
        for layer in layers:
            layer._disable_adapters = True
        # DeepSpeed keeps parts of weights, until its engine gathers them.
        partitioned = gather_params_ctx(list(tower.parameters()), modifier_rank=None)
        with torch.no_grad(), torch.random.fork_rng(devices=devices), partitioned:
            yield
    finally:
        for module, was_training in training:
            module.training = was_training
        for layer, was_disabled in zip(layers, disabled):
            layer._disable_adapters = was_disabled
