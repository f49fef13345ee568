"""
Finds the tokens that prompts stand in front of: the first that each sample sees, or that of each packed sequence.

Each attention module finds them in its own mask, and their positions in its own rotations or position ids. So it does
not matter which part of the model is called, who calls it, and at which position a sequence starts.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ..anatomy.arguments import Role, Signature
from ..errors import UnsupportedModelError
from ..upstream import local_reach
from .cached_first_tokens import CachedFirstTokens, cached_first_tokens
from .first_tokens import FirstTokens, Positions, align, deduplicate, differ_from_first, map_positions, sample_axis
from .module_call import ModuleCall
from .packed_sequences import check_packing
from .visibility import Visibility


# The first tokens of a call, and what is to be kept of them with its cache, if anything.
Found = tuple[FirstTokens, CachedFirstTokens | None]


def find_first_tokens(
    attention: nn.Module, path: str, signature: Signature, arguments: dict[str, Any]
) -> FirstTokens | None:
    """
    Finds the first token of each sequence in a call of an attention module.

    Returns:
        [`~peft_m2pt.attention.first_tokens.FirstTokens`], or `None` if no argument carries positions.

    Raises:
        UnsupportedModelError: If the first tokens, or their positions, are not certain.
    """
    positions = given_positions(signature, arguments)
    if not positions:
        check_packing(attention, path, signature, arguments)
        return None
    call = ModuleCall(attention, path, signature, arguments, positions)
    first_tokens, to_cache = _find(call) if call.is_in_graph else _find_once(call)
    if to_cache is not None:
        cached_first_tokens(call.cache)[call.layer] = to_cache
    return first_tokens


def given_positions(signature: Signature, arguments: dict[str, Any]) -> Positions:
    """The arguments of an attention module that carry positions."""
    return {
        argument.name: arguments[argument.name]
        for argument in signature.arguments
        if argument.role in (Role.ROTATIONS, Role.POSITIONS) and arguments.get(argument.name) is not None
    }


def cache_first_tokens(
    attention: nn.Module, path: str, signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """
    Keeps the first tokens that a module without prompts puts into a cache, for prompts that are used on top of it
    later. A single token is skipped: decoding goes on from earlier ones.
    """
    tokens = signature.find_input(args, kwargs)
    if tokens.shape[-2] == 1 or torch.compiler.is_compiling():
        return
    arguments = signature.bind(args, kwargs)
    # The paged cache of continuous batching has no length. All of its requests start at position 0.
    if hasattr(signature.find(Role.CACHE, arguments), "get_seq_length"):
        # The module needs no prompts; one that does refuses what is not certain.
        with contextlib.suppress(UnsupportedModelError):
            find_first_tokens(attention, path, signature, arguments)


# What was found for other layers of a forward pass, by the first tensor of positions, which each pass makes anew.
_found: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _find_once(call: ModuleCall) -> Found:
    """Finds first tokens once for all layers that get the same."""
    sources = call.sources
    key = (local_reach(call.attention), tuple(map(_version, sources)))
    if None in key[1]:
        return _find(call)
    found = _found.setdefault(sources[0], [])
    for other_key, references, result in found:
        if other_key == key and all(reference() is source for reference, source in zip(references, sources)):
            return result
    result = _find(call)
    found.append((key, [_reference(source) for source in sources], result))
    return result


def _version(source: Any) -> int | None:
    """Changes with every in-place change of a tensor. `None` in inference mode, where torch does not count these."""
    if not isinstance(source, torch.Tensor):
        return 0
    return None if source.is_inference() else source._version


def _reference(source: Any) -> Callable[[], Any]:
    return (lambda: None) if source is None else weakref.ref(source)


def _find(call: ModuleCall) -> Found:
    check_packing(call.attention, call.path, call.signature, call.arguments)
    if call.is_in_graph or not call.is_first:
        return _find_by_sample(call)
    starts = call.packed_starts()
    if starts is not None:
        first = deduplicate(call.take(torch.zeros_like(starts), starts))
        by_sequence = None if first.by_sample is None else first.by_sample.tolist()
        last = deduplicate(call.take(torch.zeros_like(starts[-1:]), starts[-1:]))
        to_cache = None if call.cache is None else CachedFirstTokens(starts[-1:], last)
        return FirstTokens(first.positions, by_sequence=by_sequence), to_cache
    visibility = call.visibility()
    if visibility is None:
        samples = torch.arange(call.num_position_rows, device=call.device)
        first, indices = deduplicate(call.take(samples, torch.zeros_like(samples))), torch.zeros_like(samples)
    else:
        first, indices = _find_by_token(call, visibility)
        first = replace(first, is_complete=bool(visibility.has_keys.all()))
    return first, None if call.cache is None else CachedFirstTokens(indices, first.of_last_sequences)


def _find_by_token(call: ModuleCall, visibility: Visibility) -> tuple[FirstTokens, torch.Tensor]:
    """Finds the first token of each sequence in each row. Returns the index of the last sequence's, too."""
    if call.cache is None and call.has_query_mask and not bool(visibility.has_keys.all()):
        sample = int((~visibility.has_keys).nonzero()[0])
        raise call.refusal(f"a mask of shape {tuple(call.mask.shape)} in which sample {sample} sees no token")
    first_visible = visibility.first_visible
    first = first_visible.expand(max(call.num_position_rows, len(first_visible)), -1)
    # From each token to the first that it sees, and on from there until one sees none before itself.
    for _ in range(call.num_tokens.bit_length()):
        first = first.gather(1, first)
    if bool((first_visible.expand_as(first).gather(1, first) != first).any()):
        raise call.refusal(f"a mask of shape {tuple(call.mask.shape)} in which no token comes first")
    last_indices = torch.where(visibility.has_keys, first[:, -1], -1)
    samples, tokens = torch.zeros_like(first, dtype=torch.bool).scatter_(1, first, True).nonzero(as_tuple=True)
    found = deduplicate(call.take(samples, tokens))
    if found.by_sample is None or len(samples) == len(first):
        return found, last_indices
    by_token = torch.zeros_like(first).index_put_((samples, tokens), found.by_sample).gather(1, first)
    by_previous = by_token.gather(1, visibility.previous_key.clamp(min=0).expand_as(by_token))
    if bool((visibility.is_ambiguous & (by_token != by_previous)).any()):
        raise call.refusal(
            f"a mask of shape {tuple(call.mask.shape)} with a hole as long as the sliding window "
            f"({visibility.window} tokens), which could also be the end of a sequence"
        )
    if bool((by_token == by_token[:, -1:]).all()):
        return FirstTokens(found.positions, by_sample=by_token[:, -1]), last_indices
    return FirstTokens(found.positions, by_token=by_token.expand(call.batch_size, -1)), last_indices


def _find_by_sample(call: ModuleCall) -> Found:
    """
    Finds one first token for each sample, behind a cache and in graphs, which cannot depend on values of a mask.
    Refuses sequences in one row that start at different positions.
    """
    if call.is_in_graph and (starts := call.packed_starts()) is not None:
        return FirstTokens(call.take(torch.zeros_like(starts), starts), by_sequence=list(range(len(starts)))), None
    visibility = call.visibility()
    if call.is_first and visibility is None:
        samples = torch.arange(call.num_position_rows, device=call.device)
        first, indices = FirstTokens(call.take(samples, torch.zeros_like(samples))), torch.zeros_like(samples)
        return first, None if call.cache is None else CachedFirstTokens(indices, first)
    if visibility is None:
        # Only the length of a static cache can still be 0 here. torch.compile makes no tensor of `call.past == 0`.
        has_tensor = isinstance(call.past, torch.Tensor)
        indices = torch.where(call.past == 0, 0, -1) if has_tensor else torch.tensor(-1, device=call.device)
        indices = indices.to(call.device).expand(call.batch_size)
        is_new = is_known = indices == 0
    else:
        indices = (visibility.first_of_sample + call.offset).expand(call.batch_size)
        is_new = visibility.has_keys & (indices >= call.past)
        is_known = is_new | ~visibility.has_keys
    samples = torch.arange(call.batch_size, device=call.device)
    positions = call.take(samples, (indices - call.past).clamp(min=0, max=call.num_tokens - 1))
    cached, continues = call.cached, False
    if cached is not None:
        is_new, is_cached, is_unclear = _match_cached(call, cached, indices, is_new, visibility is not None)
        continues = not call.is_in_graph and bool((is_cached & ~is_new).all())
        if continues and call.num_tokens == 1:
            return cached.first_tokens, None
        is_known = (is_known & ~is_unclear) | is_cached
        positions = map_positions(
            lambda new, old: torch.where(align(is_new, new), new, old),
            positions,
            cached.first_tokens.positions_of_samples,
        )
        indices = torch.where(is_new, indices, cached.indices)
    if not call.is_first:
        positions = _check(call, positions, is_known, "a cache whose first tokens stand at unknown positions")
    if visibility is not None and call.num_tokens > 1:
        is_later_start = visibility.is_start & (visibility.columns != visibility.first_of_sample[:, None])
        is_alone = ~(is_later_start & differ_from_first(call.positions, positions)).any(-1)
        where = "in a compiled graph" if call.is_in_graph else "on top of a cache"
        what = f"several sequences in one row that start at different positions, {where}"
        positions = _check(call, positions, is_alone, what)
    if continues:
        return cached.first_tokens, None
    first = FirstTokens(positions)
    if not call.is_in_graph:
        first = replace(deduplicate(positions), is_complete=bool((indices >= 0).all()))
    has_new = call.cache is not None and (call.is_in_graph or bool(is_new.any()))
    return first, CachedFirstTokens(indices, first) if has_new else None


def _match_cached(
    call: ModuleCall, cached: CachedFirstTokens, indices: torch.Tensor, is_new: torch.Tensor, has_mask: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Whether the first token of each sample is in this call, is the cached one, or may be either."""
    is_cached = (cached.indices >= 0).expand(call.batch_size)
    if not has_mask:
        return is_new, is_cached, torch.zeros_like(is_new)
    if call.sees_all:
        return is_new, indices == cached.indices, torch.zeros_like(is_new)
    # A window or a chunk may hide the cached one.
    is_unclear = is_new & is_cached
    is_cached = is_cached & (indices >= cached.indices)
    _, chunk = local_reach(call.attention)
    if chunk is not None:
        begins_chunk = (indices - cached.indices) % chunk == 0
        is_new = is_new & ~(is_unclear & begins_chunk)
        is_unclear = is_unclear & ~begins_chunk
    return is_new, is_cached & ~is_unclear, is_unclear


def _check(call: ModuleCall, positions: Positions, is_right: torch.Tensor, what: str) -> Positions:
    """Refuses a call unless something is right for each sample. A graph that drops the check gets NaN instead."""
    error = call.refusal(what)
    if not call.is_in_graph:
        if not bool(is_right.all()):
            raise error
        return positions
    torch._assert_async(is_right.all(), error.reason)
    return map_positions(lambda tensor: torch.where(align(is_right, tensor), tensor, _invalid(tensor)), positions)


def _invalid(tensor: torch.Tensor) -> torch.Tensor:
    if sample_axis(tensor) == -3:
        return tensor.new_full((), torch.nan)
    return torch.full_like(tensor, torch.iinfo(tensor.dtype).max)
