"""
Plain-torch stand-ins for attention kernels, so that models run with them on any machine.

`flash_attn_func` and `flash_attn_varlen_func` do what the page of the flash-attn package says of them: no mask, causal
attention lines up the last query with the last key, and a window of `(left, right)` keys around that place.

`flex_attention` goes by the blocks of a `BlockMask` and looks at its function only inside of partial blocks, as the
compiled kernels do.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
import transformers.masking_utils
import transformers.modeling_flash_attention_utils as flash_utils
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from transformers import PreTrainedModel
from transformers.integrations.flex_attention import WrappedFlexAttention


KERNELS = ("flash_attention_2", "flex_attention")

# The functions that were called, one after the other.
calls: list[str] = []


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, deterministic=False
):
    """Attention of `(batch_size, length, num_heads, head_dim)`."""
    calls.append("flash_attn_func")
    return _attend(q, k, v, softmax_scale, causal, window_size, softcap)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    deterministic=False,
):
    """Attention of sequences that are packed into one, `(total_length, num_heads, head_dim)`."""
    calls.append("flash_attn_varlen_func")
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert cu_seqlens_q[-1] == len(q) and cu_seqlens_k[-1] == len(k) == len(v)
    assert cu_seqlens_q.diff().max() <= max_seqlen_q and cu_seqlens_k.diff().max() <= max_seqlen_k
    parts = []
    for i in range(len(cu_seqlens_q) - 1):
        queries = q[cu_seqlens_q[i] : cu_seqlens_q[i + 1]]
        keys, values = (part[cu_seqlens_k[i] : cu_seqlens_k[i + 1]] for part in (k, v))
        parts.append(_attend(queries[None], keys[None], values[None], softmax_scale, causal, window_size, softcap)[0])
    return torch.cat(parts)


def _attend(q, k, v, softmax_scale, causal, window_size, softcap):
    assert q.dtype == k.dtype == v.dtype
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    distance = torch.arange(k.shape[1]) - (torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1])
    left, right = window_size
    hidden = (distance > 0) & causal
    hidden |= (distance < -left) & (left >= 0)
    hidden |= (distance > right) & (right >= 0)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num()
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def flex_attention(query, key, value, score_mod=None, block_mask=None, scale=None, enable_gqa=False, **kwargs):
    """Attention of `(batch_size, num_heads, length, head_dim)`."""
    calls.append("flex_attention")
    assert enable_gqa or query.shape[1] == key.shape[1]
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    for dims in (
        (0, None, None, None, 0),
        (0, None, None, 0, None),
        (0, None, 0, None, None),
        (0, 0, None, None, None),
    ):
        score_mod = torch.vmap(score_mod, in_dims=dims)
    # As torch does around its own kernel: without it, torch 2.6 cannot index a mask under vmap.
    with TransformGetItemToIndex():
        scores = score_mod(scores, *map(torch.arange, scores.shape))
    if block_mask is not None:
        assert block_mask.seq_lengths == scores.shape[2:]
        inside = create_mask(block_mask.mask_mod, *block_mask.shape[:2], *scores.shape[2:], device="cpu")
        partial = _visible(block_mask.kv_num_blocks, block_mask.kv_indices, block_mask.BLOCK_SIZE, scores.shape)
        full = _visible(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, block_mask.BLOCK_SIZE, scores.shape)
        scores = scores.masked_fill(~(full | (partial & inside)), -torch.inf)
    return scores.softmax(-1).nan_to_num() @ value


def _visible(num_blocks, indices, block_size, shape):
    """The queries and keys in some blocks, `(batch_size, 1, query_length, key_length)`."""
    blocks = torch.zeros(*indices.shape[:-1], indices.shape[-1] + 1, dtype=torch.bool)
    is_listed = torch.arange(indices.shape[-1]) < num_blocks[..., None]
    blocks.scatter_(-1, torch.where(is_listed, indices, indices.shape[-1]).long(), True)
    rows, columns = (torch.arange(length) // size for length, size in zip(shape[2:], block_size))
    return blocks[:, :, rows][..., columns]


def _create_block_mask(*args, _compile=True, **kwargs):
    return create_block_mask(*args, **kwargs)


@contextmanager
def stand_ins() -> Iterator[None]:
    """While this context is open, models run with all of the above."""
    version_2, padding, version_3 = ModuleType("flash_attn"), ModuleType("bert_padding"), ModuleType("interface")
    for module in (version_2, version_3):
        module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
        module.flash_attn_with_kvcache = flash_attn_func
    padding.pad_input, padding.unpad_input = flash_utils._pad_input, flash_utils._unpad_input
    modules = {
        "flash_attn": version_2,
        "flash_attn.bert_padding": padding,
        "flash_attn_interface": version_3,
    }
    calls.clear()
    with pytest.MonkeyPatch.context() as patch:
        # One by one: `mock.patch.dict` would also take away what is imported while this is open, and torch._inductor
        # cannot be imported twice.
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        patch.setattr(flash_utils, "is_flash_attn_2_available", lambda: True)
        patch.setattr(flash_utils, "_loaded_implementation", None)
        patch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda *args, **kwargs: True)
        patch.setattr(WrappedFlexAttention, "__call__", lambda self: flex_attention)
        patch.setattr(transformers.masking_utils, "create_block_mask", _create_block_mask)
        yield
