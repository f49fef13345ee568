"""What is read from the code of a `forward` is what happens when it runs, or nothing is known."""

import contextlib
import functools
import importlib.util
import itertools
import re
import sys
import textwrap

import pytest
import torch
from helpers.models import make_llava
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import get_peft_model

from peft_m2pt import M2PTConfig, UnsupportedModelError
from peft_m2pt.anatomy.forward_code import Flow, find_calls


PREAMBLE = """
import contextlib
import torch
import torch.nn.functional as F
from torch import nn
from helpers.blocks import Parts


def double_(tensor):
    return tensor.mul_(2)


def overwrite(tensor):
    tensor[:] = 0.25
    return tensor


def doubled(tensor):
    return tensor * 2


class Block(Parts):
"""
numbers = itertools.count()


def make_block(body, folder):
    """A block whose `forward(self, h, flag, n)` is this code."""
    name = f"made_for_reading_{next(numbers)}"
    code = "def forward(self, h, flag=False, n=2):\n" + textwrap.indent(body, "    ")
    (folder / f"{name}.py").write_text(PREAMBLE + textwrap.indent(code, "    "))
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Block()


def claim(block):
    """What is read of the input of the attention. `None` if that is unknown."""
    flows = {call.flow for call in find_calls(block, "attn")}
    return flows.pop() if len(flows) == 1 else None


class Seen:
    """What hooks see while a block runs, as copies."""

    def __init__(self, block):
        self.inputs = []
        self.calls = {name: [] for name, _ in block.named_children()}
        block.register_forward_pre_hook(lambda module, args: self.inputs.append(args[0].clone()))
        for name, child in block.named_children():
            child.register_forward_pre_hook(functools.partial(self.note, name), with_kwargs=True)
            child.register_forward_hook(lambda module, args, output, name=name: self.close(name, output.clone()))

    def note(self, name, module, args, kwargs):
        (states,) = *args, *kwargs.values()
        # What is no tensor is no state of the block either.
        self.calls[name].append([states.clone() if isinstance(states, torch.Tensor) else torch.empty(0), None])

    def close(self, name, output):
        next(call for call in reversed(self.calls[name]) if call[1] is None)[1] = output

    def allows(self, flow, states):
        """Whether these states may have come about in this way."""
        if not flow.modules:
            return not flow.from_input or torch.equal(states, self.inputs[-1])
        *before, last = flow.modules
        rest = Flow(tuple(before), flow.from_input)
        return any(
            output is not None and torch.equal(states, output) and self.allows(rest, read)
            for read, output in self.calls[last]
        )


@torch.no_grad()
def check(block):
    flow = claim(block)
    if flow is None:
        return
    for training, flag, n in itertools.product((False, True), (False, True), (0, 1, 2)):
        block.train(training)
        seen = Seen(block)
        states = torch.randn(2, 4, generator=torch.Generator().manual_seed(n))
        with contextlib.suppress(Exception):  # some of the code cannot run to its end
            block(states, flag, n)
        for read, _ in seen.calls["attn"]:
            assert seen.allows(flow, read), f"read as {flow}"


# In the templates below, V is a variable, P an expression without choices, E any expression, C a condition, B indented
# statements, and L a way to leave a loop.
SIMPLE = ["V", "self.norm1(V)", "self.norm2(states=V)", "self.norm2(self.norm1(V))", "self.drop(V)", "V.contiguous()"]
CHANGING = [
    *("V.add_(0.5)", "V + 0.5", "torch.mul(V, 1.5, out=V)", "F.leaky_relu(V, 0.2, True)", "self.activation(V)"),
    *("self.scale(V)", "self.halve(V)", "double_(V)", "overwrite(V)", "doubled(V)", "(lambda t: t.mul_(3))(V)"),
    *("getattr(V, 'add_')(1)", "torch.Tensor.add_(V, 1)", "V.__iadd__(0.5)", "self.attend(V)"),
]
CHOICES = [
    *("(V := P)", "(P if flag else P)", "(P if self.fixed else P)", "(P if self.training else P)"),
    *("(P if self.is_learning else P)", "[P for _ in range(2)][-1]", "[(V := P) for _ in range(2)][-1]"),
]
STATEMENTS = [
    *("V = E", "V = E", "V = V = E", "V: torch.Tensor = E", "V, V = E, E", "V += 1", "V[0] = 0.5", "V.data = V * 2"),
    *(
        "E",
        "flag and E",
        "del V",
        "f = self.attn\nf(E)",
        "self.attn.forward(E)",
        "import math as V",
        "V = self.attn(E)",
    ),
    *("self.attn(E)", "self.attn(E)", "raise ValueError", "return h", "pass"),
]
COMPOUND = [
    *("if C:\nB\nelse:\nB", "if C:\nB", "for _ in range(n):\nL\nB\nelse:\nB", "for _ in range(n):\nB\nL"),
    *("for V in [x, y]:\nB", "while n > 0:\n    n -= 1\nL\nB", "try:\nB\nfinally:\nB"),
    *("try:\nB\nexcept (ValueError, NameError) as x:\nB\nelse:\nB", "try:\nB\nexcept ValueError:\nB\nfinally:\nB"),
    *("with contextlib.suppress(ValueError, NameError):\nB", "with torch.no_grad():\nB"),
    *(
        "match n:\n    case 1 if E is y:\n        pass\n    case V:\n        pass",
        "def f():\n    nonlocal x, y\n    V = E\nf()",
    ),
    *("def f(h, x, y):\nB\nf(h, x, y)", "f = lambda: E\nh = self.norm1(x)\nf()"),
]
CONDITIONS = ["flag", "self.fixed", "self.training", "not self.is_learning", "n > 1"]
LEAVE = ["if flag:\n    break", "if flag:\n    continue", "pass"]


@st.composite
def bodies(draw):
    def choose(templates):
        return fill(draw(st.sampled_from(templates)), draw(st.integers(0, 1)))

    def fill(template, depth):
        return re.sub(r"\b[VPECBL]\b", lambda match: part(match[0], depth), template)

    def part(kind, depth):
        if kind == "V":
            return draw(st.sampled_from("hxy"))
        if kind == "P":
            return choose(draw(st.sampled_from([SIMPLE, SIMPLE, CHANGING])))
        if kind == "E":
            return choose(draw(st.sampled_from([SIMPLE, SIMPLE, CHANGING, CHOICES])))
        if kind == "C":
            return draw(st.sampled_from(CONDITIONS))
        if kind == "L":
            return textwrap.indent(draw(st.sampled_from(LEAVE)), "    ")
        return textwrap.indent(lines(depth), "    ")

    def lines(depth):
        templates = [STATEMENTS, COMPOUND] if depth else [STATEMENTS]
        chosen = [draw(st.sampled_from(draw(st.sampled_from(templates)))) for _ in range(draw(st.integers(1, 3)))]
        return "\n".join(fill(template, depth - 1) for template in chosen)

    return "\n".join(["x = h", "y = self.norm1(h)", lines(2), "self.attn(x)"])


@settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(body=bodies())
def test_what_is_read_is_what_happens(tmp_path, body):
    check(make_block(body, tmp_path))


@pytest.mark.parametrize(
    "body, flow",
    [
        ("self.attn(h)", Flow()),
        ("self.attn(self.drop(self.norm1(h)))", Flow(("norm1", "drop"))),
        ("h = h + 1\nself.attn(self.norm1(h))", Flow(("norm1",), from_input=False)),
        ("x: torch.Tensor = h.contiguous()\nself.attn(x)", Flow()),
        ("self.attn(x := self.norm1(h))", Flow(("norm1",))),
        ("if self.fixed:\n    h = self.norm1(h)\nself.attn(h)", Flow(("norm1",))),
        ("if flag:\n    h = self.norm1(h)\nelse:\n    h = self.norm1(h)\nself.attn(h)", Flow(("norm1",))),
        ("with torch.no_grad():\n    h = self.norm1(h)\nself.attn(h)", Flow(("norm1",))),
        ("for _ in range(n):\n    x = self.norm1(h)\n    self.attn(x)", Flow(("norm1",))),
        ("for _ in range(n):\n    self.attn(self.norm1(h))\n    h = h + 1", Flow(("norm1",), from_input=False)),
        ("match n:\n    case 1:\n        pass\n    case _:\n        y = 2\nself.attn(h)", Flow()),
        ("try:\n    y = 1\nfinally:\n    self.attn(h)", Flow()),
        ("y = doubled(h)\nself.attn(h)", Flow()),
    ],
)
def test_what_is_certain_is_known(tmp_path, body, flow):
    block = make_block(body, tmp_path)
    assert claim(block) == flow
    check(block)


@pytest.mark.parametrize(
    "body",
    [
        "h.add_(1)\nself.attn(h)",
        "x = h[0]\nx.add_(1)\nself.attn(h)",
        "torch.mul(h, 2, out=h)\nself.attn(h)",
        "overwrite(h)\nself.attn(h)",
        "self.activation(h)\nself.attn(h)",
        "try:\n    h = h + 1\nfinally:\n    h = h * 2\nself.attn(h)",
        "try:\n    raise ValueError\nexcept ValueError:\n    h = h + 1\nself.attn(h)",
        "match n:\n    case 1:\n        h = h + 1\nself.attn(h)",
        "match h:\n    case h if flag:\n        pass\nmatch n:\n    case h:\n        pass\nself.attn(h)",
        "(h := h + 1)\nself.attn(h)",
        "for _ in range(n):\n    pass\nelse:\n    h = h + 1\nself.attn(h)",
        "for _ in range(n):\n    self.attn(h)\n    h = h + 1",
        "while n > 0:\n    n -= 1\n    self.attn(h)\n    h = self.norm1(h)",
        "if self.training:\n    h = h + 1\nself.attn(h)",
        "self.attn(h + 1 if self.is_learning else h)",
        "with contextlib.suppress(ValueError):\n    h = self.norm1(h)\nself.attn(h)",
        "def f():\n    nonlocal h\n    h = h + 1\nf()\nself.attn(h)",
        "def f():\n    self.attn(h)\nh = self.norm1(h)\nf()",
        "self.attn(h)\nf = self.attn\nf(h + 1)",
        "self.attn(h)\nself.attend(h + 1)",
        "self.attn(h)\nself.attn.forward(h + 1)",
        "self.attn(h)\ngetattr(self, 'attn')(h + 1)",
        "h += 1\nself.attn(h)",
        "h[0] = 0\nself.attn(h)",
        "self.norm1 = self.norm2\nself.attn(self.norm1(h))",
        "flag and (h := h + 1)\nself.attn(h)",
        "self.attn(*(h,))",
    ],
)
def test_what_is_not_certain_is_unknown(tmp_path, body):
    assert claim(make_block(body, tmp_path)) is None


def test_what_is_unknown_is_refused(tmp_path):
    """From the model's side: a layer that changes its input in place is refused by name."""
    code = """
    import torch
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    class Shifting(LlamaDecoderLayer):
        def forward(self, hidden_states, **kwargs):
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
            hidden_states.add_(1.0)
            return residual + self.self_attn(hidden_states, **kwargs)[0]
    """
    path = tmp_path / "shifting_layers.py"
    path.write_text(textwrap.dedent(code))
    spec = importlib.util.spec_from_file_location("shifting_layers", path)
    sys.modules["shifting_layers"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = make_llava()
    for layer in model.model.language_model.layers:
        layer.__class__ = module.Shifting
    path = "model.language_model.layers.0.self_attn"
    message = f"input of the attention '{path}' is not clear from the code of Shifting"
    with pytest.raises(UnsupportedModelError, match=message):
        get_peft_model(model, M2PTConfig())
