"""What the arguments of attention modules are. Annotations, code and names must not contradict each other."""

import importlib
import inspect
import pkgutil

import pytest
import torch
import transformers.models
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peft_m2pt.anatomy.arguments import NAMES, Role, read_signature
from peft_m2pt.anatomy.attention_calls import find_attention_call


def attention_classes():
    """All classes of transformers that M2PT takes for attention."""
    for info in pkgutil.walk_packages(transformers.models.__path__, "transformers.models."):
        if not info.name.rpartition(".")[2].startswith("modeling_"):
            continue
        try:
            module = importlib.import_module(info.name)
        except ImportError:  # of packages that are not installed
            continue
        for value in vars(module).values():
            is_own = inspect.isclass(value) and value.__module__ == module.__name__ and issubclass(value, nn.Module)
            if is_own and not issubclass(value, PreTrainedModel) and find_attention_call(value):
                yield value


def test_names_do_not_contradict_what_annotations_and_code_say(monkeypatch):
    by_all = {cls: read_signature.__wrapped__(cls) for cls in attention_classes()}
    assert len(by_all) > 300
    known = dict(NAMES)
    for name in known:
        monkeypatch.delitem(NAMES, name)
    num_caches = 0
    for cls, signature in by_all.items():
        for argument in read_signature.__wrapped__(cls).arguments[1:]:
            by_name = known.get(argument.name)
            assert argument.role in (None, by_name) or by_name is None, f"{cls.__name__}.{argument.name}"
            num_caches += argument.role is Role.CACHE
        assert [a.role for a in signature.arguments].count(Role.CACHE) <= 1
    # Caches are found without the help of names.
    assert num_caches > 150


class Base(nn.Module):
    def attend(self, *args, **kwargs):
        return ALL_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)


def apply_rotary_pos_emb(queries, keys, *rotations):
    return queries, keys


def roles(forward) -> list[Role | None]:
    cls = type("Attention", (Base,), {"forward": forward})
    return [argument.role for argument in read_signature.__wrapped__(cls).arguments[1:]]


@pytest.mark.parametrize(
    "annotation, role",
    [
        (Cache, Role.CACHE),
        (DynamicCache | None, Role.CACHE),
        ("EncoderDecoderCache | None", Role.CACHE),
        ("Cache | Missing", None),
        (BlockMask | torch.Tensor | None, Role.MASK),
        (tuple[torch.Tensor, torch.Tensor], Role.ROTATIONS),
        ("tuple[torch.Tensor, torch.Tensor] | None", Role.ROTATIONS),
        (tuple[torch.Tensor, torch.Tensor, torch.Tensor], None),
        (torch.Tensor | None, None),
    ],
)
def test_annotations(annotation, role):
    def forward(self, states, argument=None):
        return self.attend(states)

    assert EncoderDecoderCache  # which an annotation names
    forward.__annotations__["argument"] = annotation
    assert roles(forward) == [role]


def test_a_pair_of_tensors_with_the_name_of_a_cache():
    """A key and a value, as before there were cache classes: not rotations, and nothing that M2PT knows."""

    def forward(self, states, past_key_value: tuple[torch.Tensor, torch.Tensor] | None = None):
        return self.attend(states)

    assert roles(forward) == [None]


class TestCode:
    def test_tells(self):
        def forward(self, states, a, b=None, c=None, d=None, e=None, f=None, **kwargs):
            attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
            cos, sin = self.rotary_emb(states, b)
            queries, keys = apply_rotary_pos_emb(states, states, a[0], a[1])
            keys, values = c.update(keys, states, 0)
            d = d[..., : keys.shape[-2]] if d is not None else None
            ends = e.to(torch.int32)
            return attend(self, queries, keys, values, attention_mask=d, cu_seq_lens_q=ends, max_length_q=f, **kwargs)

        kinds = [Role.ROTATIONS, Role.POSITIONS, Role.CACHE, Role.MASK, Role.BOUNDARIES, Role.MAX_LENGTH]
        assert roles(forward) == kinds

    def test_several_uses_tell_nothing(self):
        def forward(self, states, a):
            queries, keys = apply_rotary_pos_emb(states, states, a)
            return ALL_ATTENTION_FUNCTIONS["sdpa"](self, queries, keys, states, a.update(1, 2))

        assert roles(forward) == [None]

    def test_what_is_no_longer_the_argument(self):
        def forward(self, states, a):
            a = self.make_mask(a)
            attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
            return attend(self, states, states, states, a)

        assert roles(forward) == [None]

    def test_a_method_that_rotates_is_no_rotary_embedding(self):
        def forward(self, states, a):
            return self.attend(self.apply_rotary(states, a))

        Attention = type("Attention", (Base,), {"forward": forward, "apply_rotary": lambda self, states, a: states})
        assert read_signature.__wrapped__(Attention).arguments[1].role is None

    def test_unpacked_arguments_are_not_counted(self):
        def forward(self, states, a):
            attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
            return attend(self, *states, 1, 2, a, a)

        assert roles(forward) == [None]

    def test_what_is_the_same_in_all_branches(self):
        def forward(self, states, a, b, flag):
            if flag:
                mask = a[..., :4]
            else:
                mask = a.to(torch.bool) if a is not None else None
            if b is not None:
                with torch.no_grad():
                    b = b.to(torch.int32)
            attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
            return attend(self, states, states, states, mask, cu_seq_lens_q=b)

        assert roles(forward) == [Role.MASK, Role.BOUNDARIES, None]

    def test_branches(self):
        def forward(self, states, a, flag):
            if flag:
                a = self.make_mask(a)
            return ALL_ATTENTION_FUNCTIONS["sdpa"](self, states, states, states, attention_mask=a)

        assert roles(forward)[0] is None

        def forward(self, states, a, flag):
            attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
            mask = a
            match flag:
                case 1:
                    mask = self.make_mask(a)
            return attend(self, states, states, states, mask)

        assert roles(forward)[0] is None

    def test_loops(self):
        def forward(self, states, a, b):
            attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
            for a in self.masks:
                states = attend(self, states, states, states, a)
            for _ in range(2):
                states = attend(self, states, states, states, b)
                b = self.make_mask(b)
            return states

        assert roles(forward) == [None, None]

    def test_try(self):
        def forward(self, states, a):
            attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
            try:
                mask = a
                states = self.attend(states)
            except ValueError:
                mask = self.make_mask(a)
            return attend(self, states, states, states, mask)

        assert roles(forward) == [None]

        def forward(self, states, a):
            attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
            try:
                a = self.make_mask(a)
            finally:
                states = attend(self, states, states, states, a)
            return states

        assert roles(forward) == [None]

    def test_assignments_in_expressions(self):
        def forward(self, states, a):
            attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
            if (a := self.make_mask(a)) is not None:
                return attend(self, states, states, states, a)

        assert roles(forward) == [None]

        def forward(self, states, a):
            attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
            return attend(self, states, states, states, (mask := a), is_causal=mask is None)

        assert roles(forward) == [Role.MASK]

    def test_functions_within_the_function(self):
        def forward(self, states, a, b):
            attend = ALL_ATTENTION_FUNCTIONS["sdpa"]

            def run(a):
                nonlocal b
                b = self.make_mask(b)
                return attend(self, states, states, states, a)

            run(None)
            return attend(self, states, states, states, b)

        assert roles(forward) == [None, None]

    def test_other_ways_to_write(self):
        def forward(self, states, a, b, c):
            attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
            with self.masks() as a:
                states = attend(self, states, states, states, a)
            b += 1
            c, _ = [attend(self, states, states, c) for c in self.masks]
            return attend(self, states, states, states, b, cu_seq_lens_q=c)

        assert roles(forward) == [None, None, None]
