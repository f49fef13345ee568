"""`adapter_names`: every sample of a batch with its own adapter equals running the samples apart."""

import pytest
import torch
from families import FAMILIES, checks
from families.spec import make_inputs as make_family_inputs
from families.spec import make_model, take_sample
from helpers.attention_kernels import KERNELS, stand_ins
from helpers.models import NUM_PATCHES, adapt, make_config, make_inputs, make_llava, randomise, without_labels
from peft import LoraConfig, get_peft_model

from peft_m2pt.layers.mixed_batch import make_sample_adapters


ADAPTERS = {
    "default": {},
    "longer": {"num_visual_tokens": 6, "num_textual_tokens": 5, "num_interaction_tokens": 0},
    "textual": {"num_visual_tokens": 0, "num_interaction_tokens": 0, "tune_connector": False, "textual_layers": [1]},
    "low_rank": {"connector_rank": 2},
}
BATCHES = [
    ["default", "longer"],
    ["longer", "__base__"],
    ["textual", "default"],
    ["__base__", "__base__"],
    ["default", "default"],
    ["low_rank", "textual"],
]


@pytest.fixture(scope="module")
def model():
    peft_model = adapt(make_llava())
    for name, kwargs in ADAPTERS.items():
        if name != "default":
            peft_model.add_adapter(name, make_config(**kwargs))
    randomise(peft_model, seed=3)
    return peft_model.eval()


def alone(model, inputs, index, adapter, call):
    """What a sample gives without the others, with its adapter as the active one."""
    sample = {name: value[index : index + 1] for name, value in inputs.items()}
    if adapter == "__base__":
        with model.disable_adapter():
            return call(model, sample)
    model.set_adapter(adapter)
    output = call(model, sample)
    model.set_adapter("default")
    return output


@pytest.mark.parametrize("attn", ["eager", "sdpa", *KERNELS])
@pytest.mark.parametrize("padding", ["no mask", "left", "right"])
@pytest.mark.parametrize("names", BATCHES, ids="-".join)
@torch.no_grad()
def test_forward(model, names, padding, attn):
    inputs = without_labels(make_inputs(padding))
    with stand_ins():
        model.get_base_model().set_attn_implementation(attn)
        logits = model(**inputs, adapter_names=names).logits
    model.get_base_model().set_attn_implementation("sdpa")
    for index, name in enumerate(names):
        expected = alone(model, inputs, index, name, lambda model, sample: model(**sample).logits)[0]
        real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))[index].bool()
        torch.testing.assert_close(logits[index][real], expected[real], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("names", BATCHES, ids="-".join)
@torch.no_grad()
def test_generate(model, names, num_beams):
    inputs = without_labels(make_inputs("left"))
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": num_beams, "do_sample": False}
    tokens = model.generate(**inputs, **options, adapter_names=names)
    for index, name in enumerate(names):
        expected = alone(model, inputs, index, name, lambda model, sample: model.generate(**sample, **options))
        assert torch.equal(tokens[index], expected[0])


@pytest.mark.parametrize(
    "family, attn",
    [
        ("qwen2_vl", "sdpa"),
        ("qwen2_vl", "flash_attention_2"),
        ("qwen2_5_vl", "flash_attention_2"),
        ("internvl", "sdpa"),
        ("idefics3", "flex_attention"),
        ("whisper", "sdpa"),
        ("gemma3", "sdpa"),
        ("clip", "sdpa"),
    ],
)
@torch.no_grad()
def test_families(family, attn):
    family = next(other for other in FAMILIES if other.name == family)
    with stand_ins():
        check_family(family, attn)


def check_family(family, attn):
    model = get_peft_model(make_model(family, attn), checks.make_config(family))
    config = checks.make_config(family)
    config.num_visual_tokens, config.num_textual_tokens = 2, 7
    model.add_adapter("other", config)
    checks.enlarge_prompts(model)
    model.eval()
    inputs = make_family_inputs(family)
    output = model(**family.pack(inputs), adapter_names=["default", "other"])
    for index, name in enumerate(["default", "other"]):
        model.set_adapter(name)
        expected = model(**family.pack(take_sample(family, inputs, index)))
        for part in ("logits", "image_embeds"):
            if getattr(output, part, None) is not None:
                actual = output[part][index]
                checks.assert_close(actual[-len(expected[part][0]) :], expected[part][0])


def test_one_name_for_each_image_in_the_paper_placement():
    config = {"num_interaction_tokens": 2, "interaction_placement": "image"}
    peft_model = adapt(make_llava(), **config)
    peft_model.add_adapter("other", make_config(**config))
    randomise(peft_model, seed=3)
    peft_model.eval()
    inputs = without_labels(make_inputs(num_image_tokens=NUM_PATCHES + 2))
    logits = peft_model(**inputs, adapter_names=["other", "default"]).logits
    for index, name in enumerate(["other", "default"]):
        expected = alone(peft_model, inputs, index, name, lambda model, sample: model(**sample).logits)
        torch.testing.assert_close(logits[index], expected[0], atol=2e-5, rtol=1e-4)
    peft_model.add_adapter("longer", make_config(**{**config, "num_interaction_tokens": 3}))
    with pytest.raises(ValueError, match="adds different numbers of tokens: {'longer': 3, 'default': 2}"):
        peft_model(**inputs, adapter_names=["longer", "default"])


def test_nothing_is_left_behind(model):
    inputs = without_labels(make_inputs())
    expected = model(**inputs).logits
    model(**inputs, adapter_names=["longer", "__base__"])
    with pytest.raises(ValueError):
        model(**inputs, adapter_names=["longer"] * 3)
    assert torch.equal(model(**inputs).logits, expected)


def test_images_of_unknown_samples(model):
    inputs = without_labels(make_inputs())
    # The second sample has two images, of two and of three tokens; the first one has one.
    inputs["pixel_values"] = torch.cat([inputs["pixel_values"], inputs["pixel_values"][:1]])
    image = inputs["input_ids"][1] == model.config.image_token_id
    inputs["input_ids"][1, image.nonzero()[1]] = 5
    with pytest.raises(ValueError, match="gets 3 images .* not known which of the 2 samples they belong to"):
        model(**inputs, adapter_names=["default", "longer"])


@pytest.mark.parametrize(
    "names, message",
    [
        (["default", "nobody"], r"\['nobody'\] is not the name of an adapter. Choose from \['default', 'longer'"),
        ([], "nothing is not the name of an adapter"),
        (["default"] * 3, "has 3 names, but the batch has 2 samples"),
        (["default"] * 4, "has 4 names, but the batch has 2 samples"),
        (["default"], "has 1 name, but the batch has 2 samples"),
        (["__base__"], "has 1 name, but the batch has 2 samples"),
        (
            ["longer"],
            "Length of `adapter_names` should be the same as the number of inputs, but got 1 and 2 respectively",
        ),
    ],
)
def test_wrong_names(model, names, message):
    inputs = without_labels(make_inputs(images=False))
    with pytest.raises(ValueError, match=message):
        model(**inputs, adapter_names=names)
    for options in ({}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}):
        with pytest.raises(ValueError, match=message):
            model.generate(**inputs, **options, adapter_names=names, max_new_tokens=2)
    embeddings = model.get_base_model().get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(ValueError, match=message):
        model(inputs_embeds=embeddings, adapter_names=names)
    with pytest.raises(TypeError, match="'default' is not a list of names"):
        model(**inputs, adapter_names="default")


@pytest.mark.parametrize("options", [{"num_beams": 4, "num_return_sequences": 2}, {"num_return_sequences": 3}])
@torch.no_grad()
def test_several_sequences_of_each_sample(model, options):
    """Batches that `generate` repeats have the adapters of their samples."""
    inputs = without_labels(make_inputs("left"))
    options = {**options, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": "num_beams" not in options}
    # With one token to choose from, chance has no say.
    options |= {} if "num_beams" in options else {"top_k": 1}
    tokens = model.generate(**inputs, **options, adapter_names=["longer", "textual"])
    number = options["num_return_sequences"]
    assert len(tokens) == 2 * number
    for index, name in enumerate(["longer", "textual"]):
        expected = alone(model, inputs, index, name, lambda model, sample: model.generate(**sample, **options))
        assert torch.equal(tokens[index * number : (index + 1) * number], expected)


def test_not_in_training_mode(model):
    model.train()
    with pytest.raises(ValueError, match="not supported in training mode"):
        model(**make_inputs(), adapter_names=["default", "longer"])
    model.eval()


def test_modules_that_were_saved_with_an_adapter():
    peft_model = adapt(make_llava(), modules_to_save=["lm_head"]).eval()
    with pytest.raises(ValueError, match=r"'lm_head' was trained with an adapter \(modules_to_save\)"):
        peft_model(**make_inputs(), adapter_names=["default", "__base__"])


def test_images_of_other_sizes():
    """As many image tokens, but of one image and of three."""
    image = 9
    one, three = [image] * 6, [image, image, 1, image, image, 2, image, image]
    samples = make_sample_adapters(["a", "b"], torch.tensor([[*one, 1, 2], three]), image)
    with pytest.raises(ValueError, match="not known which of the 2 samples"):
        samples.for_images(4, "tower")
    samples = make_sample_adapters(["a", "b"], torch.tensor([three, three]), image)
    assert samples.for_images(6, "tower") == ["a"] * 3 + ["b"] * 3


def test_adapters_of_other_methods():
    lora = get_peft_model(make_llava(), LoraConfig(target_modules=["up_proj"]), adapter_name="lora")
    peft_model = get_peft_model(lora.get_base_model(), make_config(), adapter_name="m2pt").eval()
    with pytest.raises(ValueError, match=r"\['lora'\] is not the name of an adapter. Choose from \['m2pt'\]"):
        peft_model(**make_inputs(), adapter_names=["lora", "m2pt"])
    with pytest.raises(ValueError, match=r"\['lora'\] is not the name of an adapter. Choose from \['m2pt'\]"):
        peft_model.add_weighted_adapter(["lora", "m2pt"], adapter_name="both")


@pytest.mark.parametrize("name", ["", "a.b", "keys", "training", "__base__"])
def test_names_that_adapters_cannot_have(name):
    model = make_llava()
    with pytest.raises(ValueError, match=f"adapter_name={name!r}: an adapter cannot have this name"):
        get_peft_model(model, make_config(), adapter_name=name)
    assert not any("m2pt" in path for path in model.state_dict())
