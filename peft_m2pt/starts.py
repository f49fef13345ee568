"""
Which tokens prompts stand in front of: the first one that a sample sees, or that of each sequence packed into a row.

That token is found in the mask that an attention module is given, and its position in the rotations or positions that
the module is given. So it does not matter who calls which part of a model, nor from where positions count.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from .adapted import base_class
from .arguments import Role, Signature, read_signature
from .attention import find_attention_call
from .errors import UnsupportedModelError
from .flash import find_packed
from .notes import Noted, notes_of
from .packing import BY_MASK
from .sight import Sight, look
from .upstream import attention_implementation, local_reach


@dataclass(frozen=True)
class Starts:
    """
    The tokens that prompts stand in front of.

    Args:
        places (`dict[str, Any]`):
            Where they stand: what each argument that tells of positions says of them. Rotations are of shape
            `(..., num_starts, 1, width)`, positions of shape `(..., num_starts, 1)`.
        of_samples (`torch.Tensor` of shape `(batch_size,)`, *optional*):
            Which of them is the start of each sample. `None` if there is one for all, or one for each in order.
        of_tokens (`torch.Tensor` of shape `(batch_size, num_tokens)`, *optional*):
            Which of them is the start of the sequence of each token, where sequences in one row start at different
            positions.
        of_sequences (`list[int]`, *optional*):
            The same for each sequence that flash attention tells apart by its boundaries.
    """

    places: dict[str, Any]
    of_samples: torch.Tensor | None = None
    of_tokens: torch.Tensor | None = None
    of_sequences: list[int] | None = None
    is_complete: bool = True
    """Whether no sample has nothing but padding so far."""
    made: dict[Any, Any] = field(default_factory=dict, repr=False)
    """What layers have computed from these places."""

    @property
    def count(self) -> int:
        """How many they are."""
        tensor = next(_tensors(self.places))
        return tensor.shape[_axis(tensor)]

    def make(self, key: Any, function: Callable[[], Any]) -> Any:
        """Computes something from these places, once for all layers, which are told the same in a forward pass."""
        if torch.compiler.is_compiling():
            return function()
        if key not in self.made:
            self.made[key] = function()
        return self.made[key]

    def __getstate__(self) -> dict[str, Any]:
        # Copies of a cache need no more.
        return {**self.__dict__, "made": {}}

    @property
    def numbers(self) -> torch.Tensor | None:
        """Which of them is the start of each sample. `None` if there is one for all."""
        if self.count == 1 or self.of_samples is not None:
            return self.of_samples
        return torch.arange(self.count, device=next(_tensors(self.places)).device)

    @property
    def of_last_tokens(self) -> Starts:
        """Those of the last sequence of each row."""
        return self if self.of_tokens is None else replace(self, of_samples=self.of_tokens[:, -1], of_tokens=None)

    @property
    def places_of_samples(self) -> dict[str, Any]:
        """Where the samples start. One place if it is that of all."""
        return self.places if self.count == 1 else _select(self.places, self.numbers)

    def select(self, samples: torch.Tensor) -> Starts:
        """Those of some samples, in the order given."""
        return self if self.count == 1 else replace(self, of_samples=self.numbers[samples])


def find_starts(attention: nn.Module, path: str, signature: Signature, arguments: dict[str, Any]) -> Starts | None:
    """
    Finds the tokens that prompts stand in front of.

    Args:
        attention (`nn.Module`):
            An attention module of the language model.
        path (`str`):
            Its module path, for error messages.
        signature ([`~peft_m2pt.arguments.Signature`]):
            What its arguments are.
        arguments (`dict[str, Any]`):
            Its arguments for the tokens.

    Returns:
        [`Starts`], or `None` if nothing tells the module of positions.

    Raises:
        UnsupportedModelError: If that cannot be known.
    """
    given = {
        argument.name: arguments[argument.name]
        for argument in signature.arguments
        if argument.role in (Role.ROTATIONS, Role.POSITIONS) and arguments.get(argument.name) is not None
    }
    if not given:
        return None
    call = _Call(attention, path, signature, arguments, given)
    starts, noted = _find(call) if call.is_in_graph else _remembered(call)
    if noted is not None:
        notes_of(call.cache)[call.layer] = noted
    return starts


def noted_starts(attention: nn.Module, cache: Any) -> Starts | None:
    """The tokens in a cache that prompts of a module stand in front of, as far as they are noted."""
    noted = notes_of(cache).get(_layer(attention))
    return None if noted is None else noted.starts


def note_starts(
    attention: nn.Module, path: str, signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """
    Notes where the tokens start that an attention module without prompts puts into a cache, for prompts that are used
    later on top of it. It does so for many tokens: those that are decoded one at a time go on from others.

    Args:
        attention (`nn.Module`):
            The attention module.
        path (`str`):
            Its module path.
        signature ([`~peft_m2pt.arguments.Signature`]):
            What its arguments are.
        args (`tuple[Any, ...]`), kwargs (`dict[str, Any]`):
            Its arguments for the tokens.
    """
    tokens = args[0] if args else kwargs[signature.input_name]
    if tokens.shape[-2] == 1 or torch.compiler.is_compiling():
        return
    arguments = signature.bind(args, kwargs)
    # The paged ones of continuous batching have no length. Prompts are refused there.
    if hasattr(signature.find(Role.CACHE, arguments), "get_seq_length"):
        # What cannot be known is refused when somebody asks for it.
        with contextlib.suppress(UnsupportedModelError):
            find_starts(attention, path, signature, arguments)


def note_starts_of_others(model: nn.Module, attention: nn.Module) -> list[RemovableHandle]:
    """
    Lets attention modules without prompts note the starts of what they put into a cache that one with prompts reads:
    those of an encoder which shares a config with the decoder.

    Args:
        model (`nn.Module`):
            The model.
        attention (`nn.Module`):
            An attention module with prompts.

    Returns:
        `list[RemovableHandle]`: The hooks. None in most models.
    """
    handles = []
    for path, module in model.named_modules():
        is_other = base_class(module) is not base_class(attention)
        is_other = is_other and getattr(module, "config", None) is attention.config
        if is_other and hasattr(module, "layer_idx") and find_attention_call(type(module)) is not None:
            handles.append(module.register_forward_pre_hook(partial(_note_starts, path), with_kwargs=True))
    return handles


def _note_starts(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    note_starts(module, path, read_signature(type(module)), args, kwargs)


def _layer(attention: nn.Module) -> int:
    return getattr(attention, "layer_idx", None) or 0


class _Call:
    """A call of an attention module: what it is told of the positions of its tokens, and of what they see."""

    def __init__(
        self, attention: nn.Module, path: str, signature: Signature, arguments: dict[str, Any], given: dict[str, Any]
    ) -> None:
        self.attention = attention
        self.path = path
        self.arguments = arguments
        self.given = given
        self.mask = signature.find(Role.MASK, arguments)
        cache = signature.find(Role.CACHE, arguments)
        # One of an encoder and a decoder holds another one.
        self.cache = getattr(cache, "self_attention_cache", cache)
        self.layer = _layer(attention)
        self._past: int | torch.Tensor | None = None
        tokens = arguments[signature.input_name]
        self.batch_size, self.num_tokens = tokens.shape[0], tokens.shape[-2]
        self.device = tokens.device
        # Where no number can be looked at.
        self.is_in_graph = torch.compiler.is_compiling() or torch.jit.is_tracing() or tokens.is_meta
        self.num_told_apart = max(tensor.shape[_axis(tensor)] for tensor in _tensors(given))
        """1 if all samples are told the same, otherwise how many there are."""
        for tensor in _tensors(given):
            axis = _axis(tensor)
            has_layout = tensor.dim() + axis in (0, 1) and tensor.shape[axis + 1] == self.num_tokens
            if not has_layout or tensor.shape[axis] not in (1, self.batch_size):
                shape = (self.batch_size, self.num_tokens)
                raise self.refusal(f"positions of shape {tuple(tensor.shape)} for tokens of shape {shape}")

    @property
    def past(self) -> int | torch.Tensor:
        """How many tokens are in the cache."""
        if self._past is None:
            length = 0 if self.cache is None else self.cache.get_seq_length(self.layer)
            self._past = length if self.is_in_graph else int(length)
        return self._past

    @property
    def is_first(self) -> bool:
        """Whether it is certain that there are no tokens before these."""
        return isinstance(self.past, int) and self.past == 0

    @property
    def offset(self) -> int | torch.Tensor:
        """How many tokens in the cache the mask has no columns for."""
        return 0 if self.is_first else self.cache.get_mask_sizes(self.num_tokens, self.layer)[1]

    @property
    def noted(self) -> Noted | None:
        """What is known of the first tokens in the cache, if it fits these."""
        noted = None if self.cache is None else notes_of(self.cache).get(self.layer)
        if noted is None or noted.starts.places.keys() != self.given.keys():
            return None
        return noted if len(noted.indices) in (1, self.batch_size) else None

    @property
    def has_wide_mask(self) -> bool:
        """Whether the mask says of each token what it sees."""
        return not isinstance(self.mask, torch.Tensor) or self.mask.dim() > 2

    @property
    def sees_all(self) -> bool:
        """Whether tokens see all that their mask shows, whatever the layer hides from them besides."""
        reach = [length for length in local_reach(self.attention) if length is not None]
        return not reach or (not self.is_in_graph and self.past + self.num_tokens <= min(reach))

    def take(self, samples: torch.Tensor, tokens: torch.Tensor) -> dict[str, Any]:
        """Where some tokens stand: each by its sample, and by its place among the tokens."""
        return _map(lambda tensor: _take(tensor, samples, tokens), self.given)

    @property
    def sources(self) -> list[Any]:
        """What `Starts` depend on."""
        return [*_tensors(self.given), self.mask, self.cache]

    def sight(self) -> Sight | None:
        """What the tokens see. `None` if there is no mask."""
        if self.mask is None:
            return None
        reach, num_before = local_reach(self.attention), self.past - self.offset
        return look(self.mask, self.batch_size, self.num_tokens, num_before, reach, self.is_in_graph)

    def sequences(self) -> torch.Tensor | None:
        """Where each sequence begins, if flash attention tells several apart in one row."""
        if self.mask is not None or attention_implementation(self.attention) in BY_MASK:
            return None
        told = dict(self.arguments)
        if self.is_in_graph:
            told["position_ids"] = None
        boundaries = find_packed(self.batch_size, self.num_tokens, told).get("cu_seq_lens_q")
        return None if boundaries is None else boundaries[:-1].long()

    def refusal(self, what: str) -> UnsupportedModelError:
        """The error that says that prompts have no known place."""
        return UnsupportedModelError(
            f"The attention '{self.path}' ({type(self.attention).__name__}) got {what}, so that M2PT does not know "
            f"where prompts stand."
        )


# By the first tensor that tells of positions, which models make anew in every forward pass: what was found for other
# layers of the pass.
_found: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _remembered(call: _Call) -> tuple[Starts, Noted | None]:
    """Finds starts once for all layers that are told the same."""
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
    """Tells a tensor from itself after a change. `None` where torch does not count changes."""
    if not isinstance(source, torch.Tensor):
        return 0
    return None if source.is_inference() else source._version


def _reference(source: Any) -> Callable[[], Any]:
    return (lambda: None) if source is None else weakref.ref(source)


def _find(call: _Call) -> tuple[Starts, Noted | None]:
    if call.is_in_graph or not call.is_first:
        return _find_in_samples(call)
    sequences = call.sequences()
    if sequences is not None:
        starts = _distinct(call.take(torch.zeros_like(sequences), sequences))
        of_sequences = None if starts.of_samples is None else starts.of_samples.tolist()
        starts = Starts(starts.places, of_sequences=of_sequences)
        last = _distinct(call.take(torch.zeros_like(sequences[-1:]), sequences[-1:]))
        return starts, None if call.cache is None else Noted(sequences[-1:], last)
    sight = call.sight()
    if sight is None:
        samples = torch.arange(call.num_told_apart, device=call.device)
        starts, indices = _distinct(call.take(samples, torch.zeros_like(samples))), torch.zeros_like(samples)
    else:
        starts, indices = _find_sequences(call, sight)
        starts = replace(starts, is_complete=bool(sight.has_some.all()))
    return starts, None if call.cache is None else Noted(indices, starts.of_last_tokens)


def _find_sequences(call: _Call, sight: Sight) -> tuple[Starts, torch.Tensor]:
    """Finds the start of each sequence in each row, and tells which token is that of the last one."""
    if call.cache is None and call.has_wide_mask and not bool(sight.has_some.all()):
        sample = int((~sight.has_some).nonzero()[0])
        raise call.refusal(f"a mask of shape {tuple(call.mask.shape)} that shows no token to sample {sample}")
    first = sight.first.expand(max(call.num_told_apart, len(sight.first)), -1)
    # From token to token, up to one that sees none in front of itself.
    for _ in range(call.num_tokens.bit_length()):
        first = first.gather(1, first)
    if bool((sight.first.expand_as(first).gather(1, first) != first).any()):
        raise call.refusal(f"a mask of shape {tuple(call.mask.shape)} in which tokens see no first one")
    indices = torch.where(sight.has_some, first[:, -1], -1)
    samples, tokens = torch.zeros_like(first, dtype=torch.bool).scatter_(1, first, True).nonzero(as_tuple=True)
    starts = _distinct(call.take(samples, tokens))
    if starts.of_samples is None or len(samples) == len(first):
        return starts, indices
    of_tokens = torch.zeros_like(first).index_put_((samples, tokens), starts.of_samples).gather(1, first)
    of_token_before = of_tokens.gather(1, sight.before.clamp(min=0).expand_as(of_tokens))
    if bool((sight.is_unclear & (of_tokens != of_token_before)).any()):
        raise call.refusal(
            f"a mask of shape {tuple(call.mask.shape)} with a hole as long as what a token sees ({sight.window} "
            f"tokens), which may as well be the end of a sequence"
        )
    if bool((of_tokens == of_tokens[:, -1:]).all()):
        return Starts(starts.places, of_samples=of_tokens[:, -1]), indices
    return Starts(starts.places, of_tokens=of_tokens.expand(call.batch_size, -1)), indices


def _find_in_samples(call: _Call) -> tuple[Starts, Noted | None]:
    """
    Finds the start of each sample where a row has sequences with one start only: behind a cache, and in graphs, which
    cannot depend on what a mask shows.
    """
    if call.is_in_graph and (sequences := call.sequences()) is not None:
        places = call.take(torch.zeros_like(sequences), sequences)
        return Starts(places, of_sequences=list(range(len(sequences)))), None
    sight = call.sight()
    if call.is_first and sight is None:
        samples = torch.arange(call.num_told_apart, device=call.device)
        starts, indices = Starts(call.take(samples, torch.zeros_like(samples))), torch.zeros_like(samples)
        return starts, None if call.cache is None else Noted(indices, starts)
    samples = torch.arange(call.batch_size, device=call.device)
    if sight is None:
        indices = torch.where(torch.as_tensor(call.past == 0, device=call.device), 0, -1).expand(call.batch_size)
        is_new = indices == 0
    else:
        indices = (sight.first_of_samples + call.offset).expand(call.batch_size)
        is_new = sight.has_some & (indices >= call.past)
    places = call.take(samples, (indices - call.past).clamp(min=0, max=call.num_tokens - 1))
    is_known = is_new if sight is None else is_new | ~sight.has_some
    noted, goes_on = call.noted, False
    if noted is not None:
        is_noted = _is_noted(call, noted, None if sight is None else indices)
        if sight is not None and not call.sees_all:
            # What is in the cache may only be too far away.
            is_unclear = is_new & (noted.indices >= 0)
            begins_chunk = _begins_chunk(call, noted, indices)
            is_new = is_new & ~(is_unclear & begins_chunk)
            is_unclear = is_unclear & ~begins_chunk
            is_known, is_noted = is_known & ~is_unclear, is_noted & ~is_unclear
        goes_on = not call.is_in_graph and bool((is_noted & ~is_new).all())
        if goes_on and call.num_tokens == 1:
            return noted.starts, None
        is_known = is_known | is_noted
        of_noted = noted.starts.places_of_samples
        places = _map(lambda new, old: torch.where(_along(is_new, new), new, old), places, of_noted)
        indices = torch.where(is_new, indices, noted.indices)
    if not call.is_first:
        places = _check(call, places, is_known, "a cache of whose first tokens it does not know where they stand")
    if sight is not None and call.num_tokens > 1:
        is_other = sight.is_start & (sight.columns != sight.first_of_samples[:, None])
        is_alone = ~(is_other & _differ(call.given, places)).any(-1)
        what = "several sequences in one row, which start at different positions,"
        what += " in a compiled graph" if call.is_in_graph else " on top of a cache"
        places = _check(call, places, is_alone, what)
    if goes_on:
        return noted.starts, None
    starts = Starts(places)
    if not call.is_in_graph:
        starts = replace(_distinct(places), is_complete=bool((indices >= 0).all()))
    is_worth_noting = call.cache is not None and (call.is_in_graph or bool(is_new.any()))
    return starts, Noted(indices, starts) if is_worth_noting else None


def _is_noted(call: _Call, noted: Noted, indices: torch.Tensor | None) -> torch.Tensor:
    """Whether what a mask shows first of each sample, if there is one, is what is noted as its first token."""
    is_noted = (noted.indices >= 0).expand(call.batch_size)
    if indices is None:
        return is_noted
    # What a layer sees first that does not see all need not be the first token.
    return indices == noted.indices if call.sees_all else is_noted & (indices >= noted.indices)


def _begins_chunk(call: _Call, noted: Noted, indices: torch.Tensor) -> torch.Tensor:
    """Whether the first token that each sample sees is the first one of a chunk, counted from what is noted."""
    _, chunk = local_reach(call.attention)
    return torch.zeros_like(indices, dtype=torch.bool) if chunk is None else (indices - noted.indices) % chunk == 0


def _distinct(places: dict[str, Any]) -> Starts:
    """Starts at these places, each once."""
    rows = [_as_rows(tensor) for tensor in _tensors(places)]
    rows = torch.cat(rows, dim=1)
    if len(rows) == 1:
        return Starts(places)
    if bool((rows == rows[:1]).all()):
        return Starts(_select(places, torch.zeros(1, dtype=torch.long, device=rows.device)))
    distinct, numbers = rows.unique(dim=0, return_inverse=True)
    examples = numbers.new_zeros(len(distinct)).scatter_(0, numbers, torch.arange(len(rows), device=rows.device))
    return Starts(_select(places, examples), of_samples=numbers)


def _check(call: _Call, places: dict[str, Any], is_right: torch.Tensor, what: str) -> dict[str, Any]:
    """Refuses a call unless something is right for each sample. A graph, which may drop the check, gives NaN then."""
    error = call.refusal(what)
    if not call.is_in_graph:
        if not bool(is_right.all()):
            raise error
        return places
    torch._assert_async(is_right.all(), error.reason)
    return _map(lambda tensor: torch.where(_along(is_right, tensor), tensor, _wrong(tensor)), places)


def _wrong(tensor: torch.Tensor) -> torch.Tensor:
    return (
        tensor.new_full((), torch.nan)
        if _axis(tensor) == -3
        else torch.full_like(tensor, torch.iinfo(tensor.dtype).max)
    )


def _differ(given: dict[str, Any], places: dict[str, Any]) -> torch.Tensor:
    """Which tokens stand elsewhere than the start of their sample, of shape `(batch_size, num_tokens)`."""
    differ = []
    for tensor, start in zip(_tensors(given), _tensors(places)):
        # Equal positions may give rotations that are not equal to the last bit.
        of_tensor = (tensor - start).abs() > 1e-5
        of_tensor = of_tensor.any(-1) if _axis(tensor) == -3 else of_tensor
        differ.append(of_tensor.flatten(0, -3).any(0) if of_tensor.dim() > 2 else of_tensor)
    return torch.stack(torch.broadcast_tensors(*differ)).any(0)


def _tensors(places: dict[str, Any]) -> Iterator[torch.Tensor]:
    """What tells of positions: numbers, rotations, or a cosine and a sine."""
    for value in places.values():
        yield from value if isinstance(value, (tuple, list)) else (value,)


def _map(function: Callable[..., torch.Tensor], places: dict[str, Any], *others: dict[str, Any]) -> dict[str, Any]:
    """Applies a function to all tensors that tell of positions."""
    result = {}
    for name, value in places.items():
        values = (value, *(other[name] for other in others))
        is_pair = isinstance(value, (tuple, list))
        result[name] = tuple(map(function, *values)) if is_pair else function(*values)
    return result


def _axis(tensor: torch.Tensor) -> int:
    """The axis of samples, in front of that of tokens. Rotations have a width behind it, positions have none."""
    return -3 if tensor.is_floating_point() or tensor.is_complex() else -2


def _take(tensor: torch.Tensor, samples: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    axis = _axis(tensor)
    if tensor.shape[axis] == 1:
        samples = torch.zeros_like(samples)
    taken = tensor[..., samples, tokens, :] if axis == -3 else tensor[..., samples, tokens]
    return taken.unsqueeze(axis + 1)


def _select(places: dict[str, Any], numbers: torch.Tensor) -> dict[str, Any]:
    return _map(lambda tensor: tensor.index_select(_axis(tensor), numbers), places)


def _along(flags: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Flags of samples, in the shape of a tensor that tells of their positions."""
    return flags.view(-1, 1, 1) if _axis(tensor) == -3 else flags.view(-1, 1)


def _as_rows(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.movedim(_axis(tensor), 0).flatten(1)
    return (torch.view_as_real(tensor).flatten(1) if tensor.is_complex() else tensor).float()
