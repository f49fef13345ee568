"""What trains, what stays frozen, and gradient checkpointing."""

import pytest
import torch
from helpers.models import adapt, make_inputs, make_llava, randomise, trained_by
from helpers.trainers import make_trainer


CHECKPOINTING = {
    "off": None,
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
}


def train_step(peft_model, inputs):
    peft_model.train()
    peft_model.zero_grad()
    loss = peft_model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in peft_model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("before", [True, False], ids=["before adapting", "after adapting"])
@pytest.mark.parametrize("checkpointing", ["reentrant", "not reentrant"])
def test_gradient_checkpointing(checkpointing, before, attn):
    inputs = make_inputs("right")
    expected_loss, expected = train_step(adapt(make_llava(attn=attn)), inputs)
    model = make_llava(attn=attn)
    if before:
        model.gradient_checkpointing_enable(CHECKPOINTING[checkpointing])
    peft_model = adapt(model)
    if not before:
        peft_model.gradient_checkpointing_enable(CHECKPOINTING[checkpointing])
    loss, gradients = train_step(peft_model, inputs)
    assert loss == expected_loss
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_only_prompts_train():
    peft_model = adapt(make_llava())
    trainable = {name for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
    assert trainable == trained_by(peft_model).keys()
    assert len(trainable) == 3 + 3 + 3 + 4  # visual, textual and interaction prompts, the connector
    _, gradients = train_step(peft_model, make_inputs())
    assert gradients.keys() == trainable
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


def test_modules_to_save_train_too():
    peft_model = adapt(make_llava(), modules_to_save=["lm_head"])
    trainable = {name for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
    assert trainable - trained_by(peft_model).keys() == {"base_model.model.lm_head.modules_to_save.default.weight"}
    _, gradients = train_step(peft_model, make_inputs())
    assert gradients.keys() == trainable


@pytest.mark.parametrize(
    "feature_layer, live", [(-2, [0, 1, 2]), (-1, [0, 1, 2, 3]), (2, [0, 1]), ([-4, -2], [0, 1, 2])], ids=str
)
def test_layers_behind_the_feature_layer_get_no_prompts(feature_layer, live):
    peft_model = adapt(make_llava(vision_feature_layer=feature_layer))
    names = [name for name in trained_by(peft_model) if "vision_tower" in name]
    assert names == [
        f"base_model.model.model.vision_tower.encoder.layers.{i}.self_attn.m2pt_prompt.default.weight" for i in live
    ]
    _, gradients = train_step(peft_model, make_inputs())
    assert all(name in gradients for name in names)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_half_precision_base_with_float32_prompts(dtype, attn):
    inputs = make_inputs("left")
    _, expected = train_step(adapt(make_llava(attn=attn)), inputs)
    peft_model = adapt(make_llava(attn=attn).to(dtype))
    assert {prompt.dtype for prompt in trained_by(peft_model).values()} == {torch.float32}
    loss, gradients = train_step(peft_model, {**inputs, "pixel_values": inputs["pixel_values"].to(dtype)})
    assert loss.isfinite()
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        similarity = torch.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0)
        assert similarity > 0.95, name


def test_prompts_in_the_dtype_of_the_base_if_asked():
    from peft import get_peft_model

    from peft_m2pt import M2PTConfig

    peft_model = get_peft_model(make_llava().to(torch.bfloat16), M2PTConfig(), autocast_adapter_dtype=False)
    assert {prompt.dtype for prompt in trained_by(peft_model).values()} == {torch.bfloat16}


def test_autocast():
    inputs = make_inputs()
    peft_model = adapt(make_llava())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, gradients = train_step(peft_model, inputs)
    assert loss.isfinite()
    assert gradients.keys() == trained_by(peft_model).keys()


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_trainer(tmp_path, checkpointing):
    model = make_llava()
    frozen = {name: value.clone() for name, value in model.state_dict().items()}
    peft_model = adapt(model)
    arguments = {}
    if checkpointing != "off":
        arguments = {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": CHECKPOINTING[checkpointing],
        }
    trainer = make_trainer(peft_model, tmp_path, **arguments)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    after = peft_model.unload().state_dict()
    assert after.keys() == frozen.keys()
    assert all(torch.equal(after[name], frozen[name]) for name in frozen)


def test_trainer_resumes(tmp_path):
    whole = adapt(make_llava())
    make_trainer(whole, tmp_path).train()
    resumed = adapt(make_llava())
    randomise(resumed, seed=9)
    make_trainer(resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, prompt in trained_by(resumed).items():
        assert torch.equal(prompt, trained_by(whole)[name]), name
