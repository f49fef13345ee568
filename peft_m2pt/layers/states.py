"""
The hidden states in front of each attention when a model reads a text or an image.

With prompts that start as the hidden states of a text, a language model computes what it computes behind that text.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.utils.integrations import gather_params_ctx
from torch import nn

from ..anatomy.arguments import read_signature
from ..anatomy.modules import is_linear, training_wrappers
from ..anatomy.sites import Site
from ..anatomy.towers import find_tower
from ..config import M2PTConfig
from ..errors import UnsupportedModelError
from ..upstream import offloaded_to
from .base import M2PTLayer
from .blank_image import blank_arguments
from .initial_text import generate_text


def states_of_text(
    model: nn.Module, config: M2PTConfig, sites: Sequence[Site], token_ids: Sequence[int] | None
) -> dict[str, torch.Tensor]:
    """
    Runs the language model on a text, from position 0 and without prompts.

    Args:
        model (`transformers.PreTrainedModel`):
            The model. It is left unchanged.
        config ([`M2PTConfig`]):
            May name the language model.
        sites (`Sequence[Site]`):
            Attention modules of the language model.
        token_ids (`Sequence[int]`, *optional*):
            The text. `None` for one that the model generates, of `config.num_textual_tokens` tokens.

    Returns:
        `dict[str, torch.Tensor]`: For the path of each site the input of its norm, of shape `[num_tokens, D]`, in the
        first call of the layer.

    Raises:
        UnsupportedModelError: If the language model cannot read a text by itself, or generate one.
    """
    path, decoder = find_tower(model, "textual", config)
    what = f"the language model '{path}' ({type(decoder).__name__})"
    configs = (getattr(decoder, "config", None), getattr(model, "config", None))
    if any(getattr(config, "is_encoder_decoder", False) for config in configs):
        raise UnsupportedModelError(
            f"{what} belongs to an encoder-decoder model, in which a text in front of both means nothing."
        )
    names = inspect.signature(type(decoder).forward).parameters
    if "input_ids" not in names:
        raise UnsupportedModelError(f"{what} takes no input_ids, so it cannot read a text by itself.")
    arguments = {"use_cache": False} if "use_cache" in names else {}
    device = _device_and_dtype(decoder)[0]

    def run(token_ids: Sequence[int]) -> Any:
        return decoder(input_ids=torch.tensor([list(token_ids)], device=device), **arguments)

    try:
        with _without_prompts(model, decoder):
            if token_ids is None:
                token_ids = generate_text(model, decoder, run, config.num_textual_tokens)
            states = _observe(sites, lambda: run(token_ids))
    except Exception as error:  # model code can raise anything
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
    Runs the vision encoder on an image of zeros, the mean of normalized images. If that has fewer tokens than wanted,
    images of noise are added.

    Returns:
        `dict[str, torch.Tensor]`: For the path of each site the first rows of the input of its norm, of shape
        `[num_tokens, D]`: the class token, if there is one, and patches.

    Raises:
        UnsupportedModelError: If it is not known how to call the encoder with an image.
    """
    path, tower = find_tower(model, "visual", config)
    what = f"the vision encoder '{path}' ({type(tower).__name__})"

    def run(num_images: int) -> dict[str, torch.Tensor]:
        device, dtype = _device_and_dtype(tower)
        error: Exception | None = None
        for arguments in blank_arguments(tower, num_tokens, num_images):
            arguments = {
                name: value.to(device, dtype if value.is_floating_point() else None)
                for name, value in arguments.items()
            }
            try:
                with _without_prompts(model, tower):
                    return _observe(sites, lambda: tower(**arguments))  # noqa: B023
            except Exception as reason:  # model code can raise anything
                error = error or reason
        why = "it is not known how to pass an image to" if error is None else "an image alone is not enough for"
        raise UnsupportedModelError(f"{why} {what}{'' if error is None else f': {error}'}.") from error

    states = run(1)
    fewest = min((len(states.get(site.path, ())) for site in sites), default=0)
    if 0 < fewest < num_tokens:
        states = run(math.ceil(num_tokens / fewest))
    for site in sites:
        found = states.get(site.path)
        if found is None or found.shape[-1] != site.width or len(found) < num_tokens:
            shape = "no states" if found is None else f"states of shape {list(found.shape)}"
            raise UnsupportedModelError(
                f"{what} has {shape} of images at '{site.path}', but {num_tokens} of width {site.width} are needed."
            )
        if not found.isfinite().all():
            raise UnsupportedModelError(f"{what} has states that are not finite at '{site.path}', in {found.dtype}.")
    return {path: found[:num_tokens] for path, found in states.items()}


def has_data(model: nn.Module) -> bool:
    """Whether the weights of a model are loaded, in memory or offloaded, and not on the meta device."""
    return _device_and_dtype(model)[0].type != "meta"


def _device_and_dtype(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """The device and dtype in which a module computes."""
    for holder in module.modules():
        for parameter in holder.parameters(recurse=False):
            if parameter.is_floating_point():
                return offloaded_to(holder) or parameter.device, parameter.dtype
    return torch.device("cpu"), torch.get_default_dtype()


def _observe(sites: Sequence[Site], run: Callable[[], Any]) -> dict[str, torch.Tensor]:
    """Runs a tower and returns the hidden states in front of each site in its first call."""
    states: dict[str, torch.Tensor] = {}

    def observe(path: str, hidden_states: torch.Tensor) -> None:
        if path not in states:
            # A copy, since layers may modify their input in place.
            states[path] = hidden_states.detach().flatten(0, -2).clone()

    with ExitStack() as stack:
        for site in sites:
            handle = _register_observer(site, observe)
            stack.callback(handle.remove)
        run()
    return states


def _register_observer(site: Site, observe: Callable[[str, torch.Tensor], None]) -> torch.utils.hooks.RemovableHandle:
    """Passes the input of the first norm of a site, or of its attention without norms, to a function."""
    if site.norms:

        def before_norm(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            observe(site.path, args[0] if args else next(iter(kwargs.values())))

        return getattr(site.block, site.norms[0]).register_forward_pre_hook(before_norm, with_kwargs=True)

    signature = read_signature(type(site.attention))

    def before_attention(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        observe(site.path, signature.bind(args, kwargs)[signature.input_name])

    return site.attention.register_forward_pre_hook(before_attention, with_kwargs=True)


@contextmanager
def _without_prompts(model: nn.Module, tower: nn.Module) -> Generator[None]:
    """Temporarily disables dropout in a tower, existing prompts and what M2PT adapters have trained beside them."""
    training = [(module, module.training) for module in tower.modules()]
    layers = [module for module in model.modules() if isinstance(module, M2PTLayer)]
    names = {name for layer in layers for name in layer._get_available_adapters()}
    # `modules_to_save` of M2PT adapters is disabled with them; that of other methods belongs to the model below.
    layers += [wrapper for wrapper in training_wrappers(model) if names.issuperset(wrapper.active_adapters)]
    disabled = [layer._disable_adapters for layer in layers]
    device = _device_and_dtype(tower)[0]
    devices = [device] if device.type == "cuda" else []
    try:
        for module, _ in training:
            # In eval mode, bitsandbytes would repack weights on CPUs for inference.
            module.training = is_linear(module)
        for layer in layers:
            layer._disable_adapters = True
        # Under ZeRO-3, weights are partitioned until the engine gathers them.
        partitioned = gather_params_ctx(list(tower.parameters()), modifier_rank=None)
        with torch.no_grad(), torch.random.fork_rng(devices=devices), partitioned:
            yield
    finally:
        for module, was_training in training:
            module.training = was_training
        for layer, was_disabled in zip(layers, disabled):
            layer._disable_adapters = was_disabled
