"""Parts of a model that are compiled, before or after it is adapted: results, names and what is saved."""

from functools import partial

import pytest
import torch
from helpers import models
from helpers.models import adapt, make_config, make_inputs, trained_by
from peft import LoraConfig, PeftModel, get_peft_model, load_peft_weights
from torch._dynamo import OptimizedModule

from peft_m2pt import M2PTConfig


INPUTS = make_inputs("left")

# To trace a layer takes a second.
make_llava = partial(models.make_llava, num_layers=(3, 2))

LANGUAGE_MODEL, PROJECTOR = "model.language_model", "model.multi_modal_projector"
PARTS = {
    "towers": [LANGUAGE_MODEL, "model.vision_tower"],
    "pieces": [
        "model.vision_tower.encoder.layers.0.self_attn",
        "model.vision_tower.encoder.layers.1",
        PROJECTOR,
        f"{LANGUAGE_MODEL}.layers.0.input_layernorm",
        f"{LANGUAGE_MODEL}.layers.0.self_attn",
        f"{LANGUAGE_MODEL}.layers.1",
    ],
    "nested": [f"{LANGUAGE_MODEL}.layers.0", LANGUAGE_MODEL, f"{PROJECTOR}.linear_1"],
}


def wrap(model, paths):
    for path in paths:
        model.set_submodule(path, torch.compile(model.get_submodule(path), backend="eager"))
    return model


def compile_in_place(model, paths):
    for path in paths:
        model.get_submodule(path).compile(backend="eager")
    return model


@pytest.fixture(autouse=True)
def afresh():
    torch._dynamo.reset()


def check_saving(peft_model, folder):
    """What is saved is what is saved without torch.compile, and loads with and without it."""
    expected = adapt(make_llava(), connector_rank=4)
    peft_model.save_pretrained(folder / "saved")
    expected.save_pretrained(folder / "expected")
    saved, weights = load_peft_weights(folder / "saved"), load_peft_weights(folder / "expected")
    assert saved.keys() == weights.keys() and all(torch.equal(saved[name], weights[name]) for name in saved)
    texts = [(folder / name / "adapter_config.json").read_text() for name in ("saved", "expected")]
    assert texts[0] == texts[1]


def adapt_and_compile(parts, compile_parts, before):
    model = make_llava()
    if before:
        compile_parts(model, PARTS[parts])
    peft_model = adapt(model, connector_rank=4)
    if not before:
        compile_parts(model, PARTS[parts])
    return peft_model


@pytest.mark.parametrize(
    "parts, compile_parts, before",
    [
        ("pieces", wrap, True),
        ("nested", wrap, True),
        ("towers", wrap, False),
        ("pieces", wrap, False),
        ("pieces", compile_in_place, True),
    ],
)
def test_training_and_saving(tmp_path, parts, compile_parts, before):
    expected = adapt(make_llava(), connector_rank=4)
    expected_output = expected(**INPUTS)
    expected_output.loss.backward()
    peft_model = adapt_and_compile(parts, compile_parts, before)
    output = peft_model(**INPUTS)
    torch.testing.assert_close(output.logits, expected_output.logits, atol=1e-4, rtol=1e-4)
    output.loss.backward()
    gradients = [parameter.grad for parameter in trained_by(expected).values()]
    for parameter, gradient in zip(trained_by(peft_model).values(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-4, rtol=1e-3)
    check_saving(peft_model, tmp_path)


@pytest.mark.parametrize(
    "parts, compile_parts, before",
    [("nested", wrap, True), ("towers", wrap, False), ("pieces", compile_in_place, True)],
)
@torch.no_grad()
def test_loading_and_unloading(tmp_path, parts, compile_parts, before):
    paths = PARTS[parts]
    expected = adapt(make_llava(), connector_rank=4)
    expected_output = expected(**INPUTS)
    expected.save_pretrained(tmp_path / "saved")
    peft_model = adapt_and_compile(parts, compile_parts, before)
    other = make_llava() if before else compile_parts(make_llava(), paths)
    loaded = PeftModel.from_pretrained(other, tmp_path / "saved")
    torch.testing.assert_close(loaded(**INPUTS).logits, expected_output.logits, atol=1e-4, rtol=1e-4)
    # Into a model that is adapted and compiled already.
    for parameter in trained_by(peft_model).values():
        parameter.data.zero_()
    peft_model.load_adapter(tmp_path / "saved", "default")
    torch.testing.assert_close(peft_model(**INPUTS).logits, expected_output.logits, atol=1e-4, rtol=1e-4)
    unloaded = peft_model.unload()
    torch.testing.assert_close(unloaded(**INPUTS).logits, make_llava()(**INPUTS).logits, atol=1e-4, rtol=1e-4)
    if compile_parts is wrap:
        assert all(isinstance(unloaded.get_submodule(path), OptimizedModule) for path in paths)


@pytest.mark.parametrize("paths", [[PROJECTOR], [f"{PROJECTOR}.linear_1"]], ids=str)
@pytest.mark.parametrize("compile_parts", [wrap, compile_in_place])
def test_a_copy_of_a_compiled_connector(paths, compile_parts):
    expected = adapt(make_llava())(**INPUTS).logits
    model = compile_parts(make_llava(), paths)
    frozen = model(**INPUTS).logits
    peft_model = adapt(model)
    torch.testing.assert_close(peft_model(**INPUTS).logits, expected, atol=1e-4, rtol=1e-4)
    with peft_model.disable_adapter():
        torch.testing.assert_close(peft_model(**INPUTS).logits, frozen, atol=1e-4, rtol=1e-4)


def test_further_adapters():
    expected = adapt(make_llava())
    expected.add_adapter("second", make_config(num_textual_tokens=5, tune_connector=False))
    peft_model = adapt(wrap(make_llava(), PARTS["pieces"]))
    peft_model.add_adapter("second", make_config(num_textual_tokens=5, tune_connector=False))
    peft_model.load_state_dict(
        dict(zip(peft_model.state_dict(), expected.state_dict().values(), strict=True)), strict=True
    )
    for name in ("default", "second"):
        expected.set_adapter(name)
        peft_model.set_adapter(name)
        torch.testing.assert_close(peft_model(**INPUTS).logits, expected(**INPUTS).logits, atol=1e-4, rtol=1e-4)
    peft_model.delete_adapter("default")
    torch.testing.assert_close(peft_model(**INPUTS).logits, expected(**INPUTS).logits, atol=1e-4, rtol=1e-4)


def test_a_failed_injection_leaves_what_is_compiled(monkeypatch):
    model = wrap(make_llava(), PARTS["pieces"])
    names = [name for name, _ in model.named_modules()]
    expected = model(**INPUTS).logits

    def fail(*args):
        raise RuntimeError("no")

    monkeypatch.setattr("peft_m2pt.model.install_hooks", fail)
    with pytest.raises(RuntimeError, match="no"):
        get_peft_model(model, make_config())
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(model(**INPUTS).logits, expected)


def test_paths_in_a_config():
    paths = {"text_decoder": "model.language_model", "vision_encoder": "model.vision_tower"}
    paths |= {"connector": "model.multi_modal_projector"}
    expected = adapt(make_llava(), **paths)(**INPUTS).logits
    for compiled in (paths, {field: f"{path}._orig_mod" for field, path in paths.items()}):
        model = wrap(make_llava(), paths.values())
        torch.testing.assert_close(adapt(model, **compiled)(**INPUTS).logits, expected, atol=1e-4, rtol=1e-4)


def test_lora_in_a_compiled_part():
    model = wrap(make_llava(), [LANGUAGE_MODEL])
    lora = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]), adapter_name="lora")
    plain = get_peft_model(make_llava(), LoraConfig(target_modules=["q_proj", "v_proj"]), adapter_name="lora")
    torch.testing.assert_close(
        adapt(lora, "m2pt")(**INPUTS).logits, adapt(plain, "m2pt")(**INPUTS).logits, atol=1e-4, rtol=1e-4
    )


def test_a_model_that_is_compiled_as_a_whole_is_refused():
    with pytest.raises(ValueError, match="torch.compile has wrapped the model"):
        get_peft_model(torch.compile(make_llava(), backend="eager"), M2PTConfig())


def test_modules_to_save_in_a_compiled_part(tmp_path):
    model = wrap(make_llava(), [LANGUAGE_MODEL])
    with pytest.raises(ValueError, match=r"includes 'model.language_model.layers.0.mlp', .* Compile this part after"):
        get_peft_model(model, make_config(modules_to_save=["layers.0.mlp"]))
    expected = adapt(make_llava(), modules_to_save=["layers.0.mlp"])
    wrap(expected.get_base_model(), [LANGUAGE_MODEL])
    expected.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llava(), tmp_path)
    torch.testing.assert_close(loaded(**INPUTS).logits, expected(**INPUTS).logits, atol=1e-4, rtol=1e-4)
