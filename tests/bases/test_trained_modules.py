"""Modules that were trained as a whole, norms above all: prompts go through the same ones as tokens."""

import zlib

import pytest
import torch
from helpers.models import adapt, make_config, make_inputs, make_llava, randomise, trained_by, without_labels
from peft import LNTuningConfig, LoraConfig, PeftModel, get_peft_model


NORMS = ["input_layernorm", "layer_norm1"]


def changed(path):
    """The weights of a norm, or of another module, after some training."""
    generator = torch.Generator().manual_seed(zlib.crc32(path.encode()))
    return lambda weight: weight + 0.5 * torch.randn(weight.shape, generator=generator)


@torch.no_grad()
def train(model, names, adapter_name=None):
    """Changes modules of these names, in a plain model, or what an adapter has in their place."""
    for path, module in model.named_modules():
        if adapter_name is not None and path.endswith(f".{adapter_name}"):
            path = path.rpartition(".")[0].rpartition(".")[0]
        elif adapter_name is not None:
            continue
        if path.rpartition(".")[2] in names:
            plain_path = path.removeprefix("base_model.model.").removeprefix("base_model.model.")
            change = changed(plain_path)
            for parameter in module.parameters():
                parameter.copy_(change(parameter))


def with_norms(names):
    model = make_llava()
    train(model, names)
    return model


def assert_same(model, expected):
    inputs = make_inputs("left")
    outputs, expected_outputs = model(**inputs), expected(**inputs)
    torch.testing.assert_close(outputs.logits, expected_outputs.logits)
    model.zero_grad()
    expected.zero_grad()
    outputs.loss.backward()
    expected_outputs.loss.backward()
    gradients = {name.rpartition("base_model.model.")[2]: weight.grad for name, weight in trained_by(model).items()}
    for name, weight in trained_by(expected).items():
        gradient = gradients[name.rpartition("base_model.model.")[2]]
        torch.testing.assert_close(gradient, weight.grad, msg=lambda text, name=name: f"{name}: {text}")
    arguments = {**without_labels(inputs), "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**arguments), expected.generate(**arguments))


@pytest.mark.parametrize("names", [NORMS[:1], NORMS[1:], ["norm", *NORMS]], ids=str)
def test_norms_of_the_adapter(tmp_path, names):
    model = adapt(make_llava(), modules_to_save=names)
    train(model, names, "default")
    expected = adapt(with_norms(names))
    assert_same(model, expected)
    gradients = {name: weight.grad for name, weight in model.named_parameters() if "modules_to_save" in name}
    # The last vision layer is not live.
    assert all(
        gradient.any() for name, gradient in gradients.items() if ".layers.3." not in name and "post" not in name
    )

    # Another adapter beside it, which has none, and one that is loaded.
    model.add_adapter("other", make_config())
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    model.load_adapter(tmp_path, adapter_name="ref")
    inputs = make_inputs()
    logits = model(**inputs).logits
    model.set_adapter("ref")
    assert torch.equal(model(**inputs).logits, logits)
    model.set_adapter("other")
    with torch.no_grad():
        for (name, weight), source in zip(
            [item for item in trained_by(model).items() if ".other." in item[0]], trained_by(expected).values()
        ):
            weight.copy_(source)
    torch.testing.assert_close(model(**inputs).logits, adapt(make_llava())(**inputs).logits)
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, make_llava()(**inputs).logits)
    model.set_adapter("default")
    assert torch.equal(model(**inputs).logits, logits)
    with pytest.raises(ValueError, match=r"adapter_names=\['default', 'other'\]: .*modules_to_save"):
        model.eval()(**without_labels(inputs), adapter_names=["default", "other"])


METHODS = {
    "LoRA": lambda names: LoraConfig(target_modules=["up_proj"], modules_to_save=names),
    "LN tuning": lambda names: LNTuningConfig(target_modules=names),
}


@pytest.mark.parametrize("is_trained", [True, False])
@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_norms_of_another_adapter(method, is_first, is_trained):
    config = METHODS[method](NORMS)
    if is_first:
        model = get_peft_model(make_llava(), config, adapter_name="norms")
    else:
        model = get_peft_model(adapt(make_llava(), adapter_name="m2pt"), config, adapter_name="norms")
    train(model, NORMS, "norms")
    if is_first:
        for weight in model.parameters():
            weight.requires_grad_(is_trained and weight.requires_grad)
        trained = {id(weight) for weight in model.parameters() if weight.requires_grad}
        model = adapt(model, adapter_name="m2pt")
        model.set_adapter("m2pt")
        weights = {id(weight) for name, weight in model.named_parameters() if weight.requires_grad}
        assert trained == weights - {id(weight) for weight in trained_by(model).values()}
    for weight in trained_by(model).values():
        weight.requires_grad_()
    assert_same(model.eval(), adapt(with_norms(NORMS), adapter_name="m2pt"))
    with model.disable_adapter():
        assert torch.equal(model(**make_inputs()).logits, make_llava()(**make_inputs()).logits)


@pytest.mark.parametrize("saved", ["lm_head", "embed_tokens", "input_layernorm"])
def test_another_adapter_on_top_leaves_trained_modules_in_use(saved):
    model = adapt(make_llava(), adapter_name="m2pt", modules_to_save=[saved])
    train(model, [saved], "m2pt")
    inputs = make_inputs()
    expected = model(**inputs).logits
    on_top = get_peft_model(model, LoraConfig(target_modules=["up_proj"]), adapter_name="first")
    assert torch.equal(on_top(**inputs).logits, expected)
    on_top.set_adapter("first")
    assert torch.equal(on_top(**inputs).logits, expected)
    # The body alone.
    on_top.set_adapter("first")
    on_top(**inputs)
    assert torch.equal(on_top.get_base_model().get_base_model().lm_head.weight, model.get_base_model().lm_head.weight)


@pytest.mark.parametrize("saved", ["lm_head", "embed_tokens", "norm"])
def test_what_lora_has_trained_stays_in_use(saved):
    lora = get_peft_model(
        make_llava(), LoraConfig(target_modules=["q_proj"], modules_to_save=[saved]), adapter_name="lora"
    )
    train(lora, [saved], "lora")
    assert_same(adapt(lora, adapter_name="m2pt"), adapt(with_norms([saved]), adapter_name="m2pt"))


@pytest.mark.parametrize("method", METHODS)
def test_samples_with_adapters_of_their_own_above_trained_norms(method):
    tuned = get_peft_model(make_llava(), METHODS[method](NORMS), adapter_name="norms")
    train(tuned, NORMS, "norms")
    models = []
    for model in (tuned, with_norms(NORMS)):
        model = adapt(model, adapter_name="m2pt")
        model.add_adapter("other", make_config(tune_connector=False))
        randomise(model, seed=4)
        models.append(model.eval()(**without_labels(make_inputs()), adapter_names=["other", "__base__"]).logits)
    torch.testing.assert_close(*models)


def test_states_of_a_second_adapter_are_those_of_the_base_model():
    config = make_config(init_prompts="states", init_token_ids=[1, 5, 9])
    first = adapt(make_llava(), modules_to_save=NORMS)
    train(first, NORMS, "default")
    torch.manual_seed(0)
    first.add_adapter("other", config)
    torch.manual_seed(0)
    expected = get_peft_model(make_llava(), config)
    for name, weight in trained_by(expected).items():
        if "m2pt_prompt" in name:
            assert torch.equal(trained_by(first)[name.replace(".default.", ".other.")], weight), name


def test_a_connector_that_lora_has_trained(tmp_path):
    """The copy is one of what LoRA has made of it, under the names of the connector itself."""
    projector = "multi_modal_projector"
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=[projector])
    lora = get_peft_model(make_llava(), config, adapter_name="lora")
    with torch.no_grad():
        for name, weight in lora.named_parameters():
            if f"{projector}.modules_to_save" in name:
                weight.mul_(2)
    inputs = make_inputs()
    expected = lora.get_base_model().model.get_image_features(inputs["pixel_values"]).pooler_output[0]
    model = get_peft_model(lora, make_config(num_visual_tokens=0), adapter_name="m2pt")
    features = model.get_base_model().model.get_image_features(inputs["pixel_values"]).pooler_output[0]
    torch.testing.assert_close(features, expected)
    names = [name for name in trained_by(model) if "m2pt_connector" in name]
    assert {name.rpartition("m2pt_connector_")[2] for name in names} == {
        f"linear_{i}.m2pt.{kind}" for i in (1, 2) for kind in ("weight", "bias")
    }
    model(**inputs).loss.backward()
    assert all(trained_by(model)[name].grad.any() for name in names)
    model.save_pretrained(tmp_path, selected_adapters=["m2pt"])
    assert PeftModel.from_pretrained(make_llava(), tmp_path / "m2pt")(**inputs).loss.isfinite()
