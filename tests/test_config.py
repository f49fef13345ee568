import collections
import collections.abc
import copy
import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from helpers.models import make_llava
from peft import PeftConfig, PeftType, get_peft_model

from peft_m2pt import M2PTAttention, M2PTConfig


FULL = {
    "num_visual_tokens": 5,
    "num_textual_tokens": 0,
    "visual_layers": [0, -1],
    "textual_layers": "top_half",
    "init_prompts": "normal",
    "init_std": 0.1,
    "exclude_modules": ["layers.1.self_attn"],
    "modules_to_save": ["lm_head"],
    "vision_encoder": "model.vision_tower",
    "text_decoder": "model.language_model",
    "connector": "model.multi_modal_projector",
}


def test_defaults():
    config = M2PTConfig()
    assert (config.num_visual_tokens, config.num_textual_tokens) == (20, 10)
    assert config.task_type is None
    assert config.peft_type is PeftType.M2PT
    assert not config.is_prompt_learning
    assert not hasattr(config, "num_virtual_tokens")


@pytest.mark.parametrize("values", [{}, FULL], ids=["defaults", "all fields"])
@pytest.mark.parametrize("load", [M2PTConfig.from_pretrained, PeftConfig.from_pretrained])
def test_json_round_trip(tmp_path, values, load):
    config = M2PTConfig(**values)
    config.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded) is M2PTConfig
    assert loaded == config
    assert loaded.peft_type is PeftType.M2PT


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_copies(duplicate):
    config = M2PTConfig(**FULL)
    get_peft_model(make_llava(), config)
    assert duplicate(config) == config
    assert duplicate(config).to_dict() == config.to_dict()


def test_unknown_keys_of_later_versions_warn(tmp_path):
    config = M2PTConfig(**FULL)
    config.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "field_of_the_future": 1}))
    with pytest.warns(UserWarning, match="field_of_the_future"):
        assert PeftConfig.from_pretrained(tmp_path) == config


@pytest.mark.parametrize("layers", [(0, 2), range(2), {1, 0}])
def test_sequences_become_lists(layers):
    assert M2PTConfig(visual_layers=layers).visual_layers == sorted(layers)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"num_visual_tokens": -1}, "num_visual_tokens=-1 is negative"),
        ({"num_textual_tokens": 2.5}, "num_textual_tokens=2.5 is not an integer"),
        ({"num_textual_tokens": True}, "num_textual_tokens=True is not an integer"),
        ({"num_visual_tokens": "20"}, "num_visual_tokens='20' is not an integer"),
        ({"num_visual_tokens": None}, "num_visual_tokens=None is not an integer"),
        ({"num_visual_tokens": 0, "num_textual_tokens": 0}, "num_visual_tokens=0 and num_textual_tokens=0"),
        ({"visual_layers": "middle"}, "visual_layers='middle' is unknown"),
        ({"textual_layers": [0, 1.0]}, "textual_layers=[0, 1.0] is neither"),
        ({"textual_layers": 3}, "textual_layers=3 is neither"),
        ({"textual_layers": []}, "textual_layers=[] selects no layer"),
        ({"visual_layers": [1, 1]}, "visual_layers=[1, 1] names a layer twice"),
        ({"init_prompts": "zeros"}, "init_prompts='zeros' is unknown"),
        ({"init_prompts": "vocabulary", "num_textual_tokens": 0}, "init_prompts='vocabulary'"),
        ({"init_std": 0}, "init_std=0 is not a finite number above 0"),
        ({"init_std": float("nan")}, "init_std=nan is not a finite number above 0"),
        ({"init_std": "0.1"}, "init_std='0.1' is not a finite number above 0"),
        ({"modules_to_save": "lm_head"}, "modules_to_save='lm_head' is not a list"),
        ({"exclude_modules": [1]}, "exclude_modules=[1] is not a list"),
        ({"vision_encoder": 1}, "vision_encoder=1 is not a module path"),
        ({"text_decoder": ""}, "text_decoder='' is not a module path"),
        ({"connector": []}, "connector=[] is not a module path"),
        ({"task_type": "NONSENSE"}, "NONSENSE"),
    ],
    ids=str,
)
def test_bad_values(values, message):
    with pytest.raises(ValueError) as error:
        M2PTConfig(**values)
    assert message in str(error.value)


def test_every_field_is_documented():
    inherited = {field.name for field in dataclasses.fields(PeftConfig)}
    for field in dataclasses.fields(M2PTConfig):
        if field.name not in inherited:
            # From Python 3.13 on, docstrings are dedented.
            assert f"    {field.name} (`" in M2PTConfig.__doc__, field.name
            assert field.metadata["help"], field.name


@pytest.mark.parametrize(
    "choice, visual, textual",
    [
        (None, [0, 1, 2], [0, 1, 2]),
        ("first", [0], [0]),
        ("odd", [1], [1]),
        ("bottom_half", [0], [0]),
        ("top_half", [1, 2], [1, 2]),
        ([0, 2], [0, 2], [0, 2]),
        ([-1], [2], [2]),
        ([2, 0], [0, 2], [0, 2]),
        ([-3, 0], [0], [0]),
    ],
    ids=str,
)
def test_layers(choice, visual, textual):
    peft_model = get_peft_model(make_llava(), M2PTConfig(visual_layers=choice, textual_layers=choice))
    chosen = {"visual": [], "textual": []}
    for module in peft_model.modules():
        if isinstance(module, M2PTAttention):
            chosen[module.site.kind].append(module.site.layer)
    assert chosen == {"visual": visual, "textual": textual}


class ListConfig(collections.abc.MutableSequence):
    """As that of OmegaConf, in which Hydra gives lists: a sequence that is no list."""

    def __init__(self, items):
        self.items = list(items)

    def __getitem__(self, index):
        return self.items[index]

    def __setitem__(self, index, value):
        self.items[index] = value

    def __delitem__(self, index):
        del self.items[index]

    def __len__(self):
        return len(self.items)

    def insert(self, index, value):
        self.items.insert(index, value)

    def __repr__(self):
        return repr(self.items)


def keys(items):
    return dict.fromkeys(items).keys()


@pytest.mark.parametrize("make", [ListConfig, tuple, set, frozenset, collections.deque, keys])
def test_sequences_of_any_class(tmp_path, make):
    config = M2PTConfig(
        visual_layers=make([0, 2]),
        textual_layers=make([1]),
        exclude_modules=make(["layers.0.self_attn"]),
        modules_to_save=make(["lm_head", "norm"]),
    )
    assert config.visual_layers == [0, 2] and config.textual_layers == [1]
    assert config.exclude_modules == ["layers.0.self_attn"] and config.modules_to_save == ["lm_head", "norm"]
    assert {type(config.visual_layers), type(config.exclude_modules), type(config.modules_to_save)} == {list}
    config.save_pretrained(tmp_path)
    assert M2PTConfig.from_pretrained(tmp_path) == config
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["lm_head", "norm"]


@pytest.mark.parametrize(
    "layers", [range(0, 3, 2), np.array([0, 2]), [np.int64(0), np.int64(2)], torch.tensor([0, 2])]
)
def test_indices_of_any_class(tmp_path, layers):
    config = M2PTConfig(visual_layers=layers)
    assert config.visual_layers == [0, 2] and set(map(type, config.visual_layers)) == {int}
    config.save_pretrained(tmp_path)
    assert M2PTConfig.from_pretrained(tmp_path) == config


@pytest.mark.parametrize("make", [ListConfig, tuple, np.array, torch.tensor])
def test_tokens_of_any_class(make):
    config = M2PTConfig(num_textual_tokens=2, init_prompts="states", init_token_ids=make([7, 5]))
    assert config.init_token_ids == [7, 5] and set(map(type, config.init_token_ids)) == {int}


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("init_token_ids", {5, 7}, "it is of type set"),
        ("init_token_ids", ListConfig([5, -7]), "it holds -7 of type int"),
        ("visual_layers", ListConfig([0, "1"]), "it holds '1' of type str"),
        ("visual_layers", ListConfig([True]), "it holds True of type bool"),
        ("textual_layers", {0: 1}, "it is of type dict"),
        ("textual_layers", 3, "it is of type int"),
        ("modules_to_save", "lm_head", "it is of type str"),
        ("modules_to_save", iter(["lm_head"]), "it is of type list_iterator"),
        ("modules_to_save", b"lm_head", "it is of type bytes"),
        ("exclude_modules", ListConfig(["a", 1]), "it holds 1 of type int"),
        ("exclude_modules", {"a", 1}, "it holds 1 of type int"),
    ],
)
def test_messages_name_the_type(field, value, message):
    with pytest.raises(ValueError, match=f"{field}=.* {message}"):
        M2PTConfig(**{field: value})
