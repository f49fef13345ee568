"""Prompts that are trained in units of their rows: training, saving, and adapters made of others."""

import copy
import pickle

import pytest
import torch
from helpers.models import TEXT, cache_of, make_config, make_inputs, make_llava, on_top_of, randomise, trained_by
from helpers.states import TOKENS, WEIGHTS, change_config, config, forbid, prompts_of, turns_of
from helpers.trainers import make_trainer
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig


class TestTraining:
    def make(self, monkeypatch, width, num_layers=3):
        changes = {"hidden_size": width, "num_hidden_layers": num_layers}
        monkeypatch.setitem(TEXT, "llama", lambda **kwargs: LlamaConfig(**{**kwargs, **changes}))
        return get_peft_model(make_llava(), config())

    @pytest.mark.parametrize("width", [48, 192])
    @pytest.mark.parametrize("num_layers", [2, 9])
    def test_how_far_a_step_turns_rows(self, width, num_layers, monkeypatch):
        peft_model = self.make(monkeypatch, width, num_layers)
        prompts = prompts_of(peft_model)
        before = {name: prompt().detach().clone() for name, prompt in prompts.items()}
        peft_model(**make_inputs()).loss.backward()
        assert all(prompt.weight.grad.norm(dim=1).min() > 0 for prompt in prompts.values())
        torch.optim.Adam(trained_by(peft_model).values(), lr=1e-3, eps=1e-30).step()
        lengths = []
        for name, prompt in prompts.items():
            step = (prompt() - before[name]).norm(dim=1) / before[name].norm(dim=1).median()
            turn = 1e-3 * turns_of(prompts)[name]
            assert 0.7 * turn < step.min() and step.max() < 1.42 * turn, name
            lengths.append(before[name].norm(dim=1))
        # Though some rows are far longer than others.
        assert torch.cat(lengths).max() > 10 * torch.cat(lengths).min()

    def test_gradients(self):
        """P = scale * W, so W has the gradient of P times its scale."""
        peft_model = get_peft_model(make_llava(), config())
        peft_model(**make_inputs()).loss.backward()
        plain = get_peft_model(make_llava(), make_config())
        with torch.no_grad():
            for name, prompt in prompts_of(plain).items():
                prompt.weight.copy_(prompts_of(peft_model)[name]())
        plain(**make_inputs()).loss.backward()
        for name, prompt in prompts_of(peft_model).items():
            expected = prompt.scale * prompts_of(plain)[name].weight.grad
            torch.testing.assert_close(prompt.weight.grad, expected, msg=name)

    def test_units_are_not_trained(self):
        peft_model = get_peft_model(make_llava(), config())
        names = {name for name, _ in peft_model.named_parameters() if "m2pt_" in name}
        assert not any("scale" in name for name in names)
        plain = get_peft_model(make_llava(), make_config())
        assert peft_model.get_nb_trainable_parameters() == plain.get_nb_trainable_parameters()

    @torch.no_grad()
    def test_caches_forget_rows_when_other_units_are_loaded(self):
        peft_model = get_peft_model(make_llava(), config())
        input_ids = make_inputs(images=False)["input_ids"]
        cache = cache_of(peft_model(input_ids, use_cache=True))
        peft_model(input_ids[:, :1], **on_top_of(cache))
        state = peft_model.state_dict()
        state |= {name: -4 * value for name, value in state.items() if name.endswith(".scale")}
        peft_model.load_state_dict(state)
        fresh, fresh_cache = copy.deepcopy(peft_model), copy.deepcopy(cache)
        logits = peft_model(input_ids[:, :1], **on_top_of(cache)).logits
        assert torch.equal(logits, fresh(input_ids[:, :1], **on_top_of(fresh_cache)).logits)

    def test_two_passes_before_a_backward_pass(self):
        """DistributedDataParallel writes buffers anew in front of every pass."""
        peft_model = get_peft_model(make_llava(), config())
        prompts = prompts_of(peft_model).values()
        loss = 0
        for seed in (1, 2):
            with torch.no_grad():
                for prompt in prompts:
                    prompt.scale.copy_(prompt.scale.clone())
            loss = loss + peft_model(**make_inputs(seed=seed)).loss
        loss.backward()
        assert all(prompt.weight.grad.any() for prompt in prompts)

    def test_resuming(self, tmp_path):
        """The second half of a run again: the units are those of the checkpoint."""

        def final(folder, **kwargs):
            trainer = make_trainer(get_peft_model(make_llava(), config()), folder, save_steps=2, max_steps=4)
            trainer.train(**kwargs)
            return {name: prompt().detach() for name, prompt in prompts_of(trainer.model).items()}

        torch.manual_seed(0)
        expected = final(tmp_path / "run")
        torch.manual_seed(1)
        resumed = final(tmp_path / "resumed", resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
        assert all(torch.equal(prompt, expected[name]) for name, prompt in resumed.items())

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copies(self, duplicate):
        peft_model = get_peft_model(make_llava(), config())
        twin = duplicate(peft_model)
        expected = peft_model(**make_inputs()).logits
        assert torch.equal(twin(**make_inputs()).logits, expected)
        for prompt in prompts_of(twin).values():
            prompt.scale.mul_(2)
        assert torch.equal(peft_model(**make_inputs()).logits, expected)

    def test_half_precision_keeps_units(self):
        peft_model = get_peft_model(make_llava(), config())
        before = {name: prompt.scale.clone() for name, prompt in prompts_of(peft_model).items()}
        peft_model.half().bfloat16()
        assert all(torch.equal(prompt.scale.float(), before[name]) for name, prompt in prompts_of(peft_model).items())


@pytest.fixture
def saved(tmp_path):
    """An adapter that is no longer what it was at the start."""
    peft_model = get_peft_model(make_llava(), config())
    randomise(peft_model, seed=4)
    peft_model.save_pretrained(tmp_path)
    return peft_model, tmp_path


def check_equal(model, expected, adapter="default"):
    prompts = prompts_of(model, adapter)
    assert prompts.keys() == prompts_of(expected).keys()
    for name, prompt in prompts_of(expected).items():
        assert torch.equal(prompts[name].weight, prompt.weight), name
        assert torch.equal(prompts[name].scale, prompt.scale), name
    inputs = make_inputs("left")
    model.set_adapter(adapter)
    assert torch.equal(model(**inputs).logits, expected(**inputs).logits)


class TestSaving:
    def test_layout(self, saved):
        _, folder = saved
        weights = load_file(folder / WEIGHTS)
        name = "base_model.model.model.language_model.layers.0.self_attn.m2pt_prompt"
        assert weights[f"{name}.scale"].shape == (3, 1) and weights[f"{name}.weight"].shape == (3, 48)
        assert sum(key.endswith(".scale") for key in weights) == 3 + 3 + 3

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    @pytest.mark.parametrize("is_trainable", [False, True])
    def test_from_pretrained(self, saved, is_trainable, low_cpu_mem_usage, monkeypatch):
        peft_model, folder = saved
        forbid(monkeypatch)
        kwargs = {"is_trainable": is_trainable, "low_cpu_mem_usage": low_cpu_mem_usage}
        loaded = PeftModel.from_pretrained(make_llava(), folder, **kwargs)
        check_equal(loaded, peft_model)
        loaded.load_adapter(folder, adapter_name="again", low_cpu_mem_usage=low_cpu_mem_usage)
        check_equal(loaded, peft_model, "again")

    def test_loading_over_an_adapter(self, saved):
        """Of another text, whose rows have other units."""
        peft_model, folder = saved
        other = get_peft_model(make_llava(), config(init_token_ids=[9, 9, 8]))
        set_peft_model_state_dict(other, get_peft_model_state_dict(peft_model))
        check_equal(other, peft_model)
        other = get_peft_model(make_llava(), config(init_token_ids=[9, 9, 8]))
        other.load_state_dict(peft_model.state_dict())
        check_equal(other, peft_model)
        other = get_peft_model(make_llava(), config(init_token_ids=[9, 9, 8]))
        other.load_adapter(folder, adapter_name="default")
        check_equal(other, peft_model)

    def test_a_half_precision_base(self, tmp_path):
        peft_model = get_peft_model(make_llava().bfloat16(), config())
        peft_model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(make_llava().bfloat16(), tmp_path)
        for name, prompt in prompts_of(loaded).items():
            assert torch.equal(prompt(), prompts_of(peft_model)[name]()), name

    @pytest.mark.parametrize("change", ["missing", "surplus", "shape", "config"])
    def test_units_that_do_not_fit(self, saved, change):
        _, folder = saved
        weights = load_file(folder / WEIGHTS)
        name = "base_model.model.model.language_model.layers.1.self_attn.m2pt_prompt.scale"
        expected = "scale of the textual prompt of layer 1 .*expected shape \\[3, 1\\], found "
        if change == "missing":
            del weights[name]
            expected += "nothing"
        elif change == "shape":
            weights[name] = torch.ones(3)
            expected += "shape \\[3\\]"
        else:
            change_config(folder, init_prompts="xavier_uniform", init_token_ids=None)
            expected = r"m2pt_prompt.scale': expected nothing, found shape \[4, 1\]"
        save_file(weights, folder / WEIGHTS)
        with pytest.raises(ValueError, match=expected):
            PeftModel.from_pretrained(make_llava(), folder)

    def test_loading_an_adapter_without_units_as_one_with(self, tmp_path):
        """It would mean something else."""
        get_peft_model(make_llava(), make_config()).save_pretrained(tmp_path)
        change_config(tmp_path, init_prompts="states", init_token_ids=TOKENS)
        with pytest.raises(ValueError, match=r"scale of the visual prompt of layer 0 .*found nothing"):
            PeftModel.from_pretrained(make_llava(), tmp_path)


class TestWeightedAdapters:
    def make(self, second):
        peft_model = get_peft_model(make_llava(), config(tune_connector=False))
        peft_model.add_adapter("second", second)
        return peft_model

    @pytest.mark.parametrize(
        "second", [config(tune_connector=False), make_config(tune_connector=False)], ids=["", "mixed"]
    )
    @pytest.mark.parametrize("order", [["default", "second"], ["second", "default"]], ids=str)
    def test_prompts_and_not_weights_are_combined(self, second, order, tmp_path):
        peft_model = self.make(second)
        randomise(peft_model, seed=6)
        peft_model.add_weighted_adapter(order, [0.5, 2.0], "mixed")
        peft_model.add_weighted_adapter(order, adapter_name="both", combination_type="cat")
        first, other = (prompts_of(peft_model, name) for name in order)
        for name, prompt in prompts_of(peft_model, "mixed").items():
            torch.testing.assert_close(prompt(), 0.5 * first[name]() + 2.0 * other[name]())
        for name, prompt in prompts_of(peft_model, "both").items():
            torch.testing.assert_close(prompt(), torch.cat([first[name](), other[name]()]), rtol=1e-6, atol=0)
        for name in ("mixed", "both"):
            peft_model.set_adapter(name)
            logits = peft_model(**make_inputs()).logits
            peft_model.save_pretrained(tmp_path, selected_adapters=[name])
            loaded = PeftModel.from_pretrained(make_llava(), tmp_path / name)
            assert torch.equal(loaded(**make_inputs()).logits, logits)
