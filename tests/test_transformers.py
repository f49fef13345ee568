"""What users of transformers do with an adapter: its own adapter methods, the auto classes, and its Trainer."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers.adapter_methods import needs_adapter_methods
from helpers.models import adapt, make_config, make_inputs, make_llava, randomise, trained_by, without_labels
from peft import AutoPeftModel, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, Trainer, TrainerCallback, TrainingArguments

from peft_m2pt import M2PTAttention


FIXTURE = Path(__file__).parent / "fixtures" / "adapter-0.1"


@torch.no_grad()
def logits(model):
    return model(**without_labels(make_inputs("left"))).logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base model in a folder, and an adapter of it."""
    folder = tmp_path_factory.mktemp("saved")
    base = make_llava()
    base.save_pretrained(folder / "base")
    base = AutoModelForImageTextToText.from_pretrained(folder / "base")
    peft_model = adapt(base)
    peft_model.save_pretrained(folder / "adapter")
    return folder, logits(peft_model)


class TestAdapterMethods:
    @needs_adapter_methods
    def test_add_adapter(self):
        model = make_llava()
        before = logits(model)
        model.add_adapter(make_config())
        randomise(model, seed=2)
        expected = logits(adapt(make_llava()))
        torch.testing.assert_close(logits(model), expected)
        model.disable_adapters()
        assert torch.equal(logits(model), before)
        model.enable_adapters()
        torch.testing.assert_close(logits(model), expected)
        model.delete_adapter("default")
        assert torch.equal(logits(model), before)

    @needs_adapter_methods
    def test_several(self, saved):
        folder, expected = saved
        model = AutoModelForImageTextToText.from_pretrained(folder / "base")
        model.load_adapter(str(folder / "adapter"), adapter_name="first")
        assert torch.equal(logits(model), expected)
        model.add_adapter(make_config(num_textual_tokens=7), adapter_name="second")
        randomise(model, seed=5)
        second = logits(model)
        assert not torch.allclose(second, expected)
        assert model.active_adapters() == ["second"]
        model.set_adapter("first")
        first = logits(model)
        model.set_adapter("second")
        assert torch.equal(logits(model), second)
        model.delete_adapter("second")
        model.set_adapter("first")
        assert torch.equal(logits(model), first)

    @needs_adapter_methods
    def test_training(self):
        model = make_llava()
        model.add_adapter(make_config())
        model(**make_inputs()).loss.backward()
        assert all(parameter.grad is not None for parameter in trained_by(model).values())
        assert all(("m2pt_" in name) == parameter.requires_grad for name, parameter in model.named_parameters())


@pytest.mark.parametrize("auto_class", [AutoModelForImageTextToText, AutoPeftModel])
def test_auto_classes(saved, auto_class):
    folder, expected = saved
    assert torch.equal(logits(auto_class.from_pretrained(folder / "adapter")), expected)


def test_several_active_adapters_side_by_side():
    """Prompts of both are seen by every token, each adapter's in front of the first one."""
    alone = {"num_interaction_tokens": 0, "tune_connector": False, "num_textual_tokens": 0}
    peft_model = adapt(make_llava(), **alone)
    peft_model.add_adapter("other", make_config(**{**alone, "num_visual_tokens": 6}))
    randomise(peft_model, seed=3)
    peft_model.base_model.set_adapter(["default", "other"])
    both = logits(peft_model)
    one = get_peft_model(make_llava(), make_config(**{**alone, "num_visual_tokens": 10}))
    prompts = trained_by(peft_model)
    with torch.no_grad():
        for name, prompt in trained_by(one).items():
            prompt.copy_(torch.cat([prompts[name], prompts[name.replace(".default.", ".other.")]]))
    torch.testing.assert_close(both, logits(one))


class Generates(TrainerCallback):
    def __init__(self):
        self.tokens = []

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self.tokens.append(model.generate(**without_labels(make_inputs("left")), max_new_tokens=3, do_sample=False))


def make_trainer(peft_model, folder, **kwargs):
    batch = make_inputs("right")
    rows = [{name: value[i].tolist() for name, value in batch.items()} for i in range(2)]
    arguments = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.05,
        "report_to": "none",
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "disable_tqdm": True,
        "use_cpu": True,
        **kwargs,
    }
    return Trainer(
        model=peft_model,
        args=TrainingArguments(output_dir=str(folder), **arguments),
        train_dataset=Dataset.from_list(rows * 4).with_format("torch"),
        eval_dataset=Dataset.from_list(rows).with_format("torch"),
    )


class TestTrainer:
    def test_evaluation_with_generation(self, tmp_path):
        trainer = make_trainer(adapt(make_llava()), tmp_path)
        generates = Generates()
        trainer.add_callback(generates)
        trainer.train()
        assert len(generates.tokens) == 3
        losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        assert losses[-1] < losses[0]

    def test_label_names(self, tmp_path):
        trainer = make_trainer(adapt(make_llava()), tmp_path)
        assert trainer.label_names == ["labels"]
        assert trainer.evaluate()["eval_loss"] > 0

    def test_best_model_at_the_end(self, tmp_path):
        # "Best" is the highest loss here, which is that of the first checkpoint.
        peft_model = adapt(make_llava())
        trainer = make_trainer(
            peft_model,
            tmp_path,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=True,
        )
        trainer.train()
        losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
        best = max(losses, key=losses.get)
        assert best < 6
        weights = load_file(tmp_path / f"checkpoint-{best}" / "adapter_model.safetensors")
        for name, parameter in trained_by(peft_model).items():
            assert torch.equal(parameter, weights[name.replace(".default.", ".")])
        assert abs(trainer.evaluate()["eval_loss"] - losses[best]) < 1e-5


class TestUpgrades:
    """Adapters that were written by the first version load for ever."""

    def test_first_version(self):
        weights = load_file(FIXTURE / "adapter_model.safetensors")
        model = make_llava()
        before = logits(model)
        peft_model = PeftModel.from_pretrained(model, FIXTURE)
        loaded = trained_by(peft_model)
        assert {name.replace(".default.", ".") for name in loaded} == set(weights)
        for name, parameter in loaded.items():
            assert torch.equal(parameter, weights[name.replace(".default.", ".")])
        counts = {
            len(m.m2pt_prompt["default"]) for m in model.modules() if isinstance(m, M2PTAttention) if m.m2pt_prompt
        }
        assert counts == {3, 4}
        assert not torch.allclose(logits(peft_model), before)

    def test_numbers_that_were_left_to_the_model(self, tmp_path):
        """`None` used to mean as many interaction prompts as visual ones, and still does where these are saved."""
        peft_model = adapt(make_llava(), num_interaction_tokens=4)
        peft_model.save_pretrained(tmp_path)
        path = tmp_path / "adapter_config.json"
        content = json.loads(path.read_text())
        assert content["num_interaction_tokens"] == content["num_visual_tokens"] == 4
        path.write_text(json.dumps({**content, "num_interaction_tokens": None}))
        loaded = PeftModel.from_pretrained(make_llava(), tmp_path)
        assert torch.equal(logits(loaded), logits(peft_model))
        loaded.save_pretrained(tmp_path)
        assert json.loads(path.read_text())["num_interaction_tokens"] == 4

    def test_fields_of_later_versions(self, tmp_path):
        content = (FIXTURE / "adapter_config.json").read_text().replace("{", '{"some_new_field": 1,', 1)
        (tmp_path / "adapter_config.json").write_text(content)
        (tmp_path / "adapter_model.safetensors").write_bytes((FIXTURE / "adapter_model.safetensors").read_bytes())
        with pytest.warns(UserWarning, match="some_new_field"):
            loaded = PeftModel.from_pretrained(make_llava(), tmp_path)
        assert torch.equal(logits(loaded), logits(PeftModel.from_pretrained(make_llava(), FIXTURE)))
