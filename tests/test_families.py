"""Every family of models in tests/families: M2PT works on it, or refuses it with a reason."""

import functools
import warnings
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, checks
from families.document import PAGE, documented_roads, has_roads, render
from families.spec import CHECKS, make_inputs, make_model
from peft import get_peft_model

from peft_m2pt import M2PTAttention, M2PTConfig, UnsupportedModelError
from peft_m2pt.anatomy.connectors import find_connector
from peft_m2pt.anatomy.layers import find_sites


KNOWN = [family for family in FAMILIES if family.is_known]
KINDS = ("visual", "textual")


@functools.lru_cache(maxsize=1)
def tuned(family):
    return checks.Tuned(family)


def cases() -> list:
    """Check by check within a family, so that its models are made once."""
    found = []
    for family in KNOWN:
        if len(family.refused) == len(KINDS) or not family.runs:
            continue
        for check in (*CHECKS, *(["roads"] if has_roads(family) else [])):
            if check not in family.without and (check != "generation" or family.generates):
                found.append(pytest.param(family, check, id=f"{family.name}-{check}"))
    return found


@pytest.mark.parametrize("family, check", cases())
def test_family(family, check):
    getattr(checks, f"check_{check}")(tuned(family))


def test_models_that_do_not_run_without_m2pt_either():
    for family in KNOWN:
        if not family.runs:
            with pytest.raises(AttributeError):
                make_model(family, "eager")(**family.pack(make_inputs(family)))


@pytest.mark.parametrize("family", KNOWN, ids=lambda family: family.name)
def test_what_is_refused(family):
    model = make_model(family, "eager" if "attention" in family.without else "sdpa")
    names = [name for name, _ in model.named_modules()]
    for kind in KINDS:
        other = next(other for other in KINDS if other != kind)
        config = M2PTConfig(**{f"num_{other}_tokens": 0}, num_interaction_tokens=0, tune_connector=False)
        if kind not in family.refused:
            assert find_sites(model, config)
            continue
        with pytest.raises(UnsupportedModelError, match=family.refused[kind]) as error:
            find_sites(model, config)
        assert f"num_{kind}_tokens=0" in str(error.value)
    if not family.refused:
        connector = find_connector(model, M2PTConfig()) if family.has_connector else None
        rows_per_token = None if connector is None else connector.rows_per_token
        assert rows_per_token == (family.connector if isinstance(family.connector, int) else None)
    assert names == [name for name, _ in model.named_modules()]


@pytest.mark.parametrize("family", KNOWN, ids=lambda family: family.name)
def test_default_config(family):
    """The config that asks for nothing in particular works, or says what to leave out."""
    model = make_model(family, "eager" if "attention" in family.without else "sdpa")
    state = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with warnings.catch_warnings():
        # Of what the connector does not allow.
        warnings.simplefilter("ignore", UserWarning)
        if not family.refused:
            assert get_peft_model(model, M2PTConfig()).get_nb_trainable_parameters()[0] > 0
            return
        with pytest.raises(UnsupportedModelError):
            get_peft_model(model, M2PTConfig())
    assert state == {name: parameter.requires_grad for name, parameter in model.named_parameters()}


SELECTIVE = {
    "dots3_note": lambda config: setattr(config.text_config, "index_topk", 4),
    "glm5_next": lambda config: setattr(config.text_config, "index_topk", 4),
    "hy_v4_vl": lambda config: setattr(config.text_config, "index_topk", 4),
    "minimax_m3_vl": lambda config: setattr(config.text_config, "index_topk_blocks", 2),
    "mistral_large4": lambda config: setattr(config.text_config, "index_topk", 4),
}


@pytest.mark.parametrize("family", [family for family in KNOWN if family.name in SELECTIVE], ids=lambda f: f.name)
def test_selection_does_not_hide_prompts(family):
    """Layers that select a few keys for each token see the prompts besides."""

    def config():
        config = family.config()
        SELECTIVE[family.name](config)
        return config

    tuned = checks.Tuned(replace(family, config=config))
    attended = []

    def compare(module, args, kwargs, output):
        if module.site.kind == "textual":
            without = module.base_layer.call_without_adapters(*args, **kwargs)
            attended.append(((output[0] - without[0]).abs().amax(-1) > 1e-4).all())

    for module in tuned.model.modules():
        if isinstance(module, M2PTAttention):
            module.register_forward_hook(compare, with_kwargs=True)
    sample = checks.take_sample(tuned.family, tuned.inputs, 0)
    with torch.no_grad():
        tuned.model(**tuned.packed(sample), use_cache=False)
    assert len(attended) > 1 and all(attended)


def test_models_with_many_layers_get_prompts_in_each():
    # PEFT shortens long lists of module paths.
    family = next(family for family in FAMILIES if family.name == "llava")
    config = family.config()
    config.vision_config.num_hidden_layers = config.text_config.num_hidden_layers = 24
    model = get_peft_model(make_model(replace(family, config=lambda: config), "sdpa"), M2PTConfig())
    layers = [module for module in model.modules() if isinstance(module, M2PTAttention)]
    assert len(layers) == 23 + 24


def test_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == render(FAMILIES, documented_roads()), (
        "docs/models.md is out of date: run `make models`"
    )
