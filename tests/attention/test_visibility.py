"""What is read from a mask."""

import pytest
import torch
from helpers.text_models import blocks_of, packed_mask

from peft_m2pt.attention.visibility import read_visibility


def brute_force(visible):
    """The first token of the sequence of each token that sees one, by following each one back."""
    starts = {}
    for token, row in enumerate(visible.tolist()):
        if any(row):
            start = token
            while visible[start].tolist().index(True) < start:
                start = visible[start].tolist().index(True)
            starts[token] = start
    return starts


@pytest.mark.parametrize("seed", range(20))
def test_what_is_read_from_a_mask(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (4,), generator=generator).tolist()
    visible = torch.stack([packed_mask(lengths, padding=2)[0, 0], packed_mask([sum(lengths)], padding=2)[0, 0]])
    window = int(torch.randint(2, 9, (), generator=generator))
    numbers = torch.arange(visible.shape[-1])
    seen = visible & (numbers[:, None] - numbers < window)
    length = visible.shape[-1]
    for mask in (seen[:, None], torch.zeros(()).masked_fill(~seen, -1e4)[:, None], blocks_of(seen[:, None])):
        for in_one_go in (False, True):
            visibility = read_visibility(mask, 2, length, 0, (window, None), in_one_go)
            first = visibility.first_visible
            for _ in range(length):
                first = first.gather(1, first)
            for sample in range(2):
                expected = brute_force(seen[sample])
                assert {token: int(first[sample, token]) for token in expected} == expected
                assert visibility.is_token[sample].nonzero().flatten().tolist() == list(expected)
