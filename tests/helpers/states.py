"""Prompts that start as the states of a text, and the states themselves."""

import json
from collections import Counter

import torch

import peft_m2pt.layers.initializer
from helpers.models import make_config, make_llava
from peft_m2pt.layers.prompt import M2PTPrompt


TOKENS = [5, 60, 7]
WEIGHTS = "adapter_model.safetensors"


def config(**kwargs):
    given = {} if "init_text" in kwargs or kwargs.get("num_textual_tokens") == 0 else {"init_token_ids": TOKENS}
    return make_config(init_prompts="states", **{**given, **kwargs})


def only_text(**kwargs):
    return config(num_visual_tokens=0, num_interaction_tokens=0, tune_connector=False, **kwargs)


def prompts_of(model, adapter="default"):
    """The prompts of an adapter by module path: what the modules of prompts return."""
    suffix = f".{adapter}"
    return {
        name.removesuffix(suffix).removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, M2PTPrompt) and name.endswith(suffix)
    }


def tower_states(model, tokens=TOKENS):
    """What transformers says that the language model's layers read."""
    output = model.model.language_model(torch.tensor([tokens]), output_hidden_states=True)
    return [states[0] for states in output.hidden_states[:-1]]


def forbid(monkeypatch):
    """Nothing reads a text, or looks at an image."""

    def fail(*args):
        raise AssertionError("a saved adapter needs no states")

    for name in ("states_of_text", "states_of_images", "given_token_ids"):
        monkeypatch.setattr(peft_m2pt.layers.initializer, name, fail)


def make_base(text="llama", **kwargs):
    """Without a window: of the text in front, all tokens see all prompts."""
    model = make_llava(text=text, **kwargs)
    if text == "mistral":
        model.model.language_model.config.sliding_window = None
    return model


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def turns_of(prompts):
    """How many times its length a row turns by a learning rate of 1: the fewer, the more layers its tower has."""
    num_layers = Counter("vision_tower" in name for name in prompts if "m2pt_prompt" in name)
    return {name: 160 / num_layers["vision_tower" in name] for name in prompts}
