"""Decoding with "sdpa", against the equation of attention on one tensor of keys."""

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from peft_m2pt.attention.eager_sdpa import attend_sdpa, mask_of_step, mask_with_prompts
from peft_m2pt.attention.prompt_kv import PromptKV


BATCH_SIZE, NUM_HEADS, NUM_KEY_VALUE_HEADS, NUM_ROWS, LENGTH, HEAD_DIM = 2, 4, 2, 3, 5, 8
BOOLEAN = torch.tensor([[True, True, False, True, True], [False, True, True, True, True]])[:, None, None]


def attend_one_by_one(rows, query, key, value, mask, scaling):
    output = torch.empty(BATCH_SIZE, 1, NUM_HEADS, HEAD_DIM)
    for sample in range(BATCH_SIZE):
        for head in range(NUM_HEADS):
            group = head * NUM_KEY_VALUE_HEADS // NUM_HEADS
            scores = torch.cat([rows.key[0, group], key[sample, group]]) @ query[sample, head, 0] * scaling
            if rows.visible is not None:
                scores[:NUM_ROWS][~rows.visible[sample, 0]] = -torch.inf
            if mask is not None:
                scores[NUM_ROWS:] += mask[sample, head % mask.shape[1], 0]
            values = torch.cat([rows.value[0, group], value[sample, group]])
            output[sample, 0, head] = scores.softmax(0) @ values
    return output


@pytest.mark.parametrize("visible", [None, [[True] * 3, [True, False, False]]], ids=["all rows", "rows of samples"])
@pytest.mark.parametrize("kind", ["none", "boolean", "added", "added for each head"])
def test_one_query(kind, visible):
    torch.manual_seed(0)
    module = torch.nn.Module()
    module.num_key_value_groups = NUM_HEADS // NUM_KEY_VALUE_HEADS
    query = torch.randn(BATCH_SIZE, NUM_HEADS, 1, HEAD_DIM)
    key, value = torch.randn(2, BATCH_SIZE, NUM_KEY_VALUE_HEADS, LENGTH, HEAD_DIM)
    rows = PromptKV(*torch.randn(2, 1, NUM_KEY_VALUE_HEADS, NUM_ROWS, HEAD_DIM))
    rows.visible = None if visible is None else torch.tensor(visible)[:, None]
    mask, added = {
        "none": (None, None),
        "boolean": (BOOLEAN, torch.zeros(BOOLEAN.shape).masked_fill(~BOOLEAN, -torch.inf)),
        "added": (torch.randn(BATCH_SIZE, 1, 1, LENGTH),) * 2,
        "added for each head": (torch.randn(BATCH_SIZE, NUM_HEADS, 1, LENGTH),) * 2,
    }[kind]
    output, _ = attend_sdpa(sdpa_attention_forward, module, rows, query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(output, attend_one_by_one(rows, query, key, value, added, 0.3))


class TestMasksOfAStep:
    """They are widened once for all layers of a forward pass, if all is the same."""

    def widen(self, layer, mask, prompts=None, **kwargs):
        prompts = prompts or PromptKV(*torch.zeros(2, 1, 1, 3, 4), is_in_front=True, **kwargs)
        query, key = torch.zeros(2, 1, 1, 4), torch.zeros(2, 1, len(prompts) + mask.shape[-1], 4)
        widened = mask_of_step(layer, prompts, query, key, mask)
        assert torch.equal(widened, mask_with_prompts(prompts, query, key, mask))
        return widened

    def test_are_shared(self):
        mask = torch.randn(2, 1, 1, 5)
        first = self.widen(0, mask)
        assert self.widen(1, mask) is first
        assert self.widen(0, mask) is not first, "that is the next forward pass"

    def test_of_each_kind_are_shared(self):
        mask, other = torch.randn(2, 2, 1, 1, 5)
        masks = [self.widen(layer, mask if layer % 2 else other) for layer in range(4)]
        assert masks[0] is masks[2] and masks[1] is masks[3]

    def test_that_change_between_layers(self):
        mask = torch.randn(2, 1, 1, 5)
        self.widen(0, mask)
        mask[0, 0, 0, 2] = torch.finfo(torch.float32).min
        self.widen(1, mask)

    def test_in_front_of_which_others_stand(self):
        mask = torch.randn(2, 1, 1, 5)
        self.widen(0, mask)
        self.widen(1, mask, PromptKV(*torch.zeros(2, 1, 1, 2, 4), is_in_front=True))
        self.widen(2, mask, visible=torch.tensor([[[True, True, False]], [[True, False, False]]]))

    def test_that_torch_does_not_count_changes_of(self):
        with torch.inference_mode():
            mask = torch.randn(2, 1, 1, 5)
            self.widen(0, mask)
            mask[0, 0, 0, 2] = torch.finfo(torch.float32).min
            self.widen(1, mask)
