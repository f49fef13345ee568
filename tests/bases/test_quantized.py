"""Bases with quantised weights: bitsandbytes in 8 and 4 bits, torchao."""

import copy
import json

import pytest
import torch
from helpers.models import (
    IMAGE_TOKEN,
    PAD_TOKEN,
    VOCAB_SIZE,
    adapt,
    make_config,
    make_inputs,
    trained_by,
    without_labels,
)
from helpers.shapes import draw, import_examples, make_model, make_processor, run_here
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torchao.quantization import Int8WeightOnlyConfig
from transformers import (
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    TorchAoConfig,
)

import peft_m2pt
from peft_m2pt import BundleError


CONNECTOR = "model.multi_modal_projector"
QUANTISATIONS = {
    "int8": lambda skip: BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip),
    "nf4": lambda skip: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, llm_int8_skip_modules=skip
    ),
    "nf4 kept as bfloat16": lambda skip: BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_quant_storage=torch.bfloat16,
        llm_int8_skip_modules=skip,
    ),
    "torchao": lambda skip: TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=skip),
}
ADAPTERS = {
    "low rank": {"connector_rank": 8},
    "frozen connector": {"tune_connector": False},
    "image": {"connector_rank": 8, "interaction_placement": "image"},
}

every_quantisation = pytest.mark.parametrize("quantisation", QUANTISATIONS.values(), ids=QUANTISATIONS)
every_adapter = pytest.mark.parametrize("kwargs", ADAPTERS.values(), ids=ADAPTERS)


def make_base():
    """As wide as a block of 4-bit weights."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
        ),
        text_config=LlamaConfig(
            hidden_size=128,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCAB_SIZE,
            pad_token_id=PAD_TOKEN,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.1,
        ),
        image_token_index=IMAGE_TOKEN,
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_base().save_pretrained(folder)
    return folder


def load(saved, quantisation, skip=None):
    model = LlavaForConditionalGeneration.from_pretrained(saved, quantization_config=quantisation(skip))
    assert type(model.model.language_model.layers[0].self_attn.q_proj.weight) is not torch.nn.Parameter
    return prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})


def inputs_for(kwargs):
    return make_inputs(num_image_tokens=6 if kwargs.get("interaction_placement") == "image" else 4)


def state_of_base(peft_model):
    """All weights that no adapter has added, as numbers. bitsandbytes keeps the scales of its own beside them."""
    state = {name: value for name, value in peft_model.get_base_model().state_dict().items() if "m2pt_" not in name}
    plain = {name: value.dequantize() if hasattr(value, "qdata") else value for name, value in state.items()}
    return {name.replace(".base_layer", ""): value.clone() for name, value in plain.items()}


@torch.no_grad()
def evaluate(model, inputs):
    # Without gradients: on some CPUs, bitsandbytes has no backward pass for 4 bits outside of training mode.
    return model.eval()(**inputs).logits


def train(peft_model, inputs, steps=4):
    peft_model.train()
    optimizer = torch.optim.SGD([p for p in peft_model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = peft_model(**inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    peft_model.eval()
    return losses


@every_quantisation
def test_prompts_that_start_as_a_text(saved, quantisation):
    """The adapter equals the quantised base model behind it."""
    model = load(saved, quantisation)
    text, input_ids = [5, 6, 7], make_inputs(images=False)["input_ids"][:1]
    expected = evaluate(model, {"input_ids": torch.cat([torch.tensor([text]), input_ids], dim=1)})[:, len(text) :]
    without = evaluate(model, {"input_ids": input_ids})
    kwargs = {"num_visual_tokens": 0, "num_interaction_tokens": 0, "tune_connector": False}
    peft_model = get_peft_model(model, make_config(init_prompts="states", init_token_ids=text, **kwargs))
    # Quantised activations round what differs in the last bit.
    difference = (evaluate(peft_model, {"input_ids": input_ids}) - expected).abs().max()
    assert difference < 0.05 * (without - expected).abs().max()


@every_adapter
@every_quantisation
def test_prompts_train_and_nothing_else_changes(saved, quantisation, kwargs):
    inputs = inputs_for(kwargs)
    peft_model = get_peft_model(load(saved, quantisation), make_config(**kwargs))
    assert peft_model.peft_config["default"].num_interaction_tokens == 2
    assert {parameter.dtype for parameter in trained_by(peft_model).values()} == {torch.float32}
    assert {name for name, p in peft_model.named_parameters() if p.requires_grad} == trained_by(peft_model).keys()
    before = state_of_base(peft_model)
    losses = train(peft_model, inputs)
    assert losses[-1] < 0.9 * losses[0]
    assert all(parameter.grad.abs().max() > 0 for parameter in trained_by(peft_model).values())
    after = state_of_base(peft_model)
    assert after.keys() == before.keys()
    for name, value in after.items():
        # Of bits that are kept as bfloat16, some stand for no number.
        torch.testing.assert_close(value, before[name], atol=0, rtol=0, equal_nan=True)


@every_adapter
@every_quantisation
def test_save_and_load(saved, tmp_path, quantisation, kwargs):
    inputs = inputs_for(kwargs)
    peft_model = adapt(load(saved, quantisation), **kwargs)
    expected = evaluate(peft_model, inputs)
    peft_model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(
            load(saved, quantisation), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage
        )
        for name, parameter in trained_by(loaded).items():
            assert torch.equal(parameter, trained_by(peft_model)[name])
        # A product with a thin matrix depends on where in memory that lies, and files are mapped into it.
        torch.testing.assert_close(evaluate(loaded, inputs), expected, atol=1e-2, rtol=0)


@every_quantisation
def test_numbers_are_those_of_the_full_base_but_for_rounding(saved, quantisation):
    inputs = make_inputs()
    quantised, full = load(saved, quantisation), make_base()
    rounding = (evaluate(quantised, inputs) - evaluate(full, inputs)).norm()
    change = -evaluate(full, inputs)
    quantised, full = adapt(quantised, connector_rank=8), adapt(full, connector_rank=8)
    change += evaluate(full, inputs)
    difference = (evaluate(quantised, inputs) - evaluate(full, inputs)).norm()
    assert difference < 3 * rounding < change.norm()


@every_quantisation
def test_disable_unload_copy_and_generate(saved, quantisation):
    inputs = make_inputs()
    expected = evaluate(load(saved, quantisation), inputs)
    peft_model = adapt(load(saved, quantisation), connector_rank=8)
    tuned = evaluate(peft_model, inputs)
    assert not torch.equal(tuned, expected)
    with peft_model.disable_adapter():
        assert torch.equal(evaluate(peft_model, inputs), expected)
    assert torch.equal(evaluate(copy.deepcopy(peft_model), inputs), tuned)
    generated = peft_model.generate(**without_labels(inputs), max_new_tokens=3, do_sample=False)
    assert generated.shape[1] > inputs["input_ids"].shape[1]
    assert torch.equal(evaluate(peft_model.unload(), inputs), expected)


@every_quantisation
def test_a_quantised_connector_is_not_copied(saved, quantisation):
    model = load(saved, quantisation)
    names = [name for name, _ in model.named_modules()]
    message = (
        rf"'{CONNECTOR}' has quantized linear layers \['linear_1', 'linear_2'\], so a full copy cannot be trained.*"
        rf"connector_rank=8, .*tune_connector=False, or load the model without quantizing '{CONNECTOR}'"
    )
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, make_config())
    assert [name for name, _ in model.named_modules()] == names
    # The last of the ways out; the others have tests of their own.
    peft_model = get_peft_model(load(saved, quantisation, skip=[CONNECTOR, "lm_head"]), make_config())
    losses = train(peft_model, make_inputs())
    assert losses[-1] < 0.9 * losses[0]
    assert all(parameter.grad.abs().max() > 0 for parameter in trained_by(peft_model).values())


@every_quantisation
def test_shares_are_those_of_the_full_base(saved, quantisation):
    quantised, full = adapt(load(saved, quantisation), connector_rank=8), adapt(make_base(), connector_rank=8)
    assert quantised.base_model.describe() == full.base_model.describe()
    assert quantised.get_nb_trainable_parameters() == full.get_nb_trainable_parameters()


def test_vocabulary_of_quantised_embeddings(saved):
    config = TorchAoConfig(Int8WeightOnlyConfig(), include_input_output_embeddings=True)
    model = load(saved, lambda skip: config)
    embeddings = model.get_input_embeddings()(torch.arange(VOCAB_SIZE))
    peft_model = get_peft_model(model, make_config(tune_connector=False, init_prompts="vocabulary"))
    prompts = [weight for name, weight in trained_by(peft_model).items() if "language_model" in name]
    prompts = torch.cat([prompt for prompt in prompts if prompt.shape[-1] == embeddings.shape[-1]])
    assert len(prompts) == 2 * 3
    assert all((embeddings == prompt).all(dim=-1).any() for prompt in prompts)
    peft_model(**make_inputs()).loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in trained_by(peft_model).values())


def test_training_script(monkeypatch, tmp_path):
    """In examples/train.py, load_in_4bit is all that it takes."""
    examples = import_examples(monkeypatch, tmp_path)
    processor = make_processor()
    processor.save_pretrained(tmp_path / "model")
    make_model(processor, width=64).save_pretrained(tmp_path / "model")
    draw(tmp_path / "data", 16)
    options = {"load_in_4bit": True, "gradient_checkpointing": True, "logging_steps": 1, "learning_rate": 0.03}
    with pytest.raises(ValueError, match="quantized linear layers.*connector_rank=8"):
        run_here(examples, monkeypatch, tmp_path, tmp_path / "run", **options, connector_rank="none")
    run_here(examples, monkeypatch, tmp_path, tmp_path / "run", **options)
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert losses[1] < losses[0]
    loaded = PeftModel.from_pretrained(load(tmp_path / "model", QUANTISATIONS["nf4"]), tmp_path / "run")
    assert len(trained_by(loaded)) > 0


@every_quantisation
@pytest.mark.parametrize("is_saved", [False, True], ids=["quantised when loaded", "saved so"])
def test_bundles(saved, tmp_path, quantisation, is_saved):
    """Of a base that is quantised when the bundle is loaded, and of one that was saved so."""
    how = {"quantization_config": quantisation([CONNECTOR, "lm_head"])}
    base = tmp_path / "base" if is_saved else saved
    if is_saved:
        LlavaForConditionalGeneration.from_pretrained(saved, **how).save_pretrained(base)
        how = {}
    model = adapt(LlavaForConditionalGeneration.from_pretrained(base, **how))
    model.save_pretrained(tmp_path / "adapter")
    peft_m2pt.bundle(base, tmp_path / "adapter", tmp_path / "bundle")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "bundle", **how)
    assert loaded.config.quantization_config.quant_method == model.config.quantization_config.quant_method
    inputs = without_labels(make_inputs())
    expected = PeftModel.from_pretrained(
        LlavaForConditionalGeneration.from_pretrained(base, **how), tmp_path / "adapter"
    )
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, expected.eval()(**inputs).logits)


@pytest.mark.parametrize("quantisation", ["int8", "nf4", "torchao"])
def test_bundles_whose_connector_is_quantised(saved, tmp_path, quantisation):
    how = {"quantization_config": QUANTISATIONS[quantisation](["lm_head"])}
    LlavaForConditionalGeneration.from_pretrained(saved, **how).save_pretrained(tmp_path / "base")
    base = LlavaForConditionalGeneration.from_pretrained(tmp_path / "base")
    adapt(base, tune_connector=False).save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        BundleError, match=r"'model\.multi_modal_projector\.linear_1\.weight' is needed: .*quantization"
    ):
        peft_m2pt.bundle(tmp_path / "base", tmp_path / "adapter", tmp_path / "bundle")
