"""Finds the norms in front of an attention, or refuses it if they are not certain."""

from __future__ import annotations

from torch import nn

from ..errors import UnsupportedModelError
from .forward_code import ChildCall, Flow, find_calls
from .modules import own_module, own_part


# Arguments by which a layer passes another sequence to an attention module, for cross-attention.
OTHER_SEQUENCES = {"context", "cross_attention_states", "encoder_hidden_states", "key_value_states"}


def find_input(model: nn.Module, path: str, remedy: str) -> tuple[nn.Module, tuple[str, ...]] | None:
    """
    Finds the block that holds the norms in front of an attention, and their names. `None` for cross-attention.

    Climbs from module to module as long as each passes on its own input.
    """
    attention_path = path
    while True:
        parent_path, _, name = path.rpartition(".")
        parent = own_part(model, parent_path)
        if isinstance(parent, nn.ModuleList):
            return own_part(model, path), ()
        calls = find_calls(parent, name)
        if any(OTHER_SEQUENCES & call.arguments for call in calls):
            return None
        flow = _common_flow(calls)
        if flow is None or not all(_is_norm(own_module(getattr(parent, module))) for module in flow.modules):
            raise UnsupportedModelError(
                f"The input of the attention '{attention_path}' is not clear from the code of "
                f"{type(parent).__name__}: it is neither the layer's input nor the output of a norm. {remedy}"
            )
        if flow.modules:
            return parent, flow.modules
        path = parent_path


def _common_flow(calls: list[ChildCall]) -> Flow | None:
    """How the input of these calls was computed, if it is the same for all."""
    flows = {call.flow for call in calls}
    return flows.pop() if len(flows) == 1 else None


def _is_norm(module: nn.Module) -> bool:
    """Whether a module acts on each token alone and keeps its width, as norms and dropout do."""
    return "norm" in type(module).__name__.lower() or isinstance(module, (nn.Dropout, nn.Identity))
