"""Prompts that start as the states of a text, or of a blank image, and that are trained in units of their rows."""

import copy
import json
import math
import pickle
import warnings
from collections import Counter

import pytest
import torch
from accelerate import cpu_offload
from families import FAMILIES
from families import spec as of_families
from models import (
    TEXT,
    VOCAB_SIZE,
    cache_of,
    make_config,
    make_inputs,
    make_llava,
    on_top_of,
    randomise,
    trained_by,
    without_labels,
)
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_training import make_trainer
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import LlamaConfig, PreTrainedTokenizerFast

import peft_m2pt.init
from peft_m2pt import M2PTConfig, UnsupportedModelError
from peft_m2pt.inspection import inspect_model
from peft_m2pt.prompt import M2PTPrompt, unit_of


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
        monkeypatch.setattr(peft_m2pt.init, name, fail)


def make_base(text="llama", **kwargs):
    """Without a window: of the text in front, all tokens see all prompts."""
    model = make_llava(text=text, **kwargs)
    if text == "mistral":
        model.model.language_model.config.sliding_window = None
    return model


@torch.no_grad()
def behind_text(model, inputs, tokens=TOKENS):
    """The logits of a model with a text in front of the first token of each sample, which is padded on the left."""
    ids, mask = [], []
    for row, row_mask in zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist()):
        padding = len(row) - sum(row_mask)
        ids.append([*row[:padding], *tokens, *row[padding:]])
        mask.append([*row_mask[:padding], *[1] * len(tokens), *row_mask[padding:]])
    mask = torch.tensor(mask)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    output = model(torch.tensor(ids), attention_mask=mask, position_ids=positions, pixel_values=inputs["pixel_values"])
    return output.logits[:, len(tokens) :]


class TestAnAdapterIsTheBaseModelBehindTheText:
    @pytest.mark.parametrize("attn", ["eager", "sdpa"])
    @pytest.mark.parametrize("text", TEXT)
    def test_llava(self, text, attn):
        inputs = without_labels(make_inputs("left"))
        peft_model = get_peft_model(make_base(text, attn=attn), only_text())
        real = inputs["attention_mask"].bool()
        with torch.no_grad():
            logits = peft_model(**inputs).logits
        expected = behind_text(make_base(text, attn=attn), inputs)
        torch.testing.assert_close(logits[real], expected[real], atol=2e-5, rtol=0)
        # This says something only if the text matters.
        assert (make_base(text, attn=attn)(**inputs).logits - expected)[real].abs().max() > 0.1

    def test_generation(self):
        inputs = {name: value[:1] for name, value in without_labels(make_inputs()).items()}
        arguments = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
        peft_model = get_peft_model(make_base(), only_text())
        tokens = peft_model.generate(**inputs, **arguments)[:, -5:]
        inputs["input_ids"] = torch.cat([torch.tensor([TOKENS]), inputs["input_ids"]], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        assert torch.equal(tokens, make_base().generate(**inputs, **arguments)[:, -5:])

    @pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "gemma3", "idefics3", "internvl"])
    def test_families(self, name):
        family = next(family for family in FAMILIES if family.name == name)

        def make():
            model = of_families.make_model(family, "sdpa")
            if name == "gemma3":
                model.config.text_config.sliding_window = 64
                for layer in model.model.language_model.layers:
                    layer.self_attn.sliding_window = layer.self_attn.sliding_window and 64
            return model

        peft_model = get_peft_model(make(), only_text())
        inputs = of_families.make_inputs(family)
        with torch.no_grad():
            logits = peft_model(**family.pack(dict(inputs))).logits
            for index in (0, 1):
                sample = of_families.take_sample(family, inputs, index)
                input_ids = torch.cat([torch.tensor([TOKENS]), sample["input_ids"]], dim=1)
                longer = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
                longer.update({media: sample[media] for media in family.media(1)})
                longer.update(family.extra(longer))
                expected = make()(**family.pack(longer)).logits[0, len(TOKENS) :]
                torch.testing.assert_close(logits[index, -len(expected) :], expected, atol=1e-4, rtol=0)

    def test_behind_lora(self):
        """LoRA that is in the model already is part of what reads the text."""

        def make():
            torch.manual_seed(0)
            lora = LoraConfig(target_modules=".*language_model.*v_proj", init_lora_weights=False)
            return get_peft_model(make_base(), lora, adapter_name="lora")

        inputs = without_labels(make_inputs("left"))
        peft_model = get_peft_model(make(), only_text(), adapter_name="m2pt")
        real = inputs["attention_mask"].bool()
        with torch.no_grad():
            logits = peft_model(**inputs).logits
        torch.testing.assert_close(logits[real], behind_text(make(), inputs)[real], atol=2e-5, rtol=0)


# Path of the encoder, a norm in front of one of its attentions, and a blank image of at least nine tokens.
BLANK = {
    "qwen2_vl": ("model.visual", "blocks.1.norm1", (torch.zeros(16, 3 * 2 * 4 * 4), torch.tensor([[1, 4, 4]]))),
    "qwen2_5_vl": ("model.visual", "blocks.1.norm1", (torch.zeros(16, 3 * 2 * 4 * 4), torch.tensor([[1, 4, 4]]))),
    "kimi_k25": ("model.vision_tower", "layers.1.norm1", (torch.zeros(16, 3, 4, 4), torch.tensor([[1, 4, 4]]))),
    "siglip2": (
        "vision_model",
        "encoder.layers.1.layer_norm1",
        (torch.zeros(1, 16, 48), torch.ones(1, 16).long(), torch.tensor([[4, 4]])),
    ),
    "gemma4": (
        "model.vision_tower",
        "encoder.layers.1.input_layernorm",
        (torch.zeros(1, 16, 48), torch.tensor([[[x, y] for y in range(4) for x in range(4)]])),
    ),
}


def turns_of(prompts):
    """How many times its length a row turns by a learning rate of 1: the fewer, the more layers its tower has."""
    num_layers = Counter("vision_tower" in name for name in prompts if "m2pt_prompt" in name)
    return {name: 160 / num_layers["vision_tower" in name] for name in prompts}


class TestStates:
    @pytest.mark.parametrize("autocast", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_prompts_are_states_bit_by_bit(self, dtype, autocast):
        model = make_llava().to(dtype)
        textual = tower_states(model)
        pixels = torch.zeros(1, 3, 16, 16, dtype=dtype)
        visual = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        peft_model = get_peft_model(model, config(), autocast_adapter_dtype=autocast)
        prompts = prompts_of(peft_model)
        for i in range(3):
            prompt = prompts[f"model.language_model.layers.{i}.self_attn.m2pt_prompt"]
            assert torch.equal(prompt().to(dtype), textual[i])
            assert prompt.weight.dtype == (torch.float32 if autocast else dtype)
            # The class token, and the first patches.
            prompt = prompts[f"model.vision_tower.encoder.layers.{i}.self_attn.m2pt_prompt"]
            assert torch.equal(prompt().to(dtype), visual[i][0, :4])
        for name, prompt in prompts.items():
            rms = prompt.weight.float().pow(2).mean(1).sqrt()
            assert 0.7 < turns_of(prompts)[name] * rms.median() < 1.42, name
            assert torch.equal(prompt.scale.log2(), prompt.scale.log2().round()), name

    def test_interaction_prompts_are_random_and_have_units(self):
        prompts = prompts_of(get_peft_model(make_llava(), config(num_interaction_tokens=30)))
        values = [prompt() for name, prompt in prompts.items() if "m2pt_interaction" in name]
        assert len(values) == 3
        bound = math.sqrt(6 / (31 * 32))
        assert 0.99 * bound < torch.stack(values).abs().max() <= bound

    @pytest.mark.parametrize(
        "rows, unit",
        [
            ([[3.0, -3.0]], 4),
            ([[1.4, 1.4]], 1),
            ([[1.0, 1.0], [1.5, 1.5], [5e4, 0.0]], 2),  # however long the longest is
            ([[0.0, 0.0], [1.0, 1.0]], 1),
            ([[1e-20, 1e-20]], 2**-66),
            ([[0.0, 0.0]], 1),
        ],
        ids=str,
    )
    def test_units(self, rows, unit):
        assert unit_of(torch.tensor(rows), 1).item() == unit
        assert unit_of(torch.tensor(rows), 8).item() in (unit, 8 * unit)

    @pytest.mark.parametrize(
        "family", [family for family in FAMILIES if family.is_known and family.name in BLANK], ids=lambda f: f.name
    )
    def test_encoders_of_other_layouts(self, family):
        """What an image is to an encoder is told by the names of its arguments."""
        model = of_families.make_model(family, "sdpa")
        path, norm, arguments = BLANK[family.name]
        seen = []
        hook = model.get_submodule(f"{path}.{norm}").register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        with torch.no_grad():
            model.get_submodule(path)(*arguments)
        hook.remove()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*init_prompts")
            peft_model = get_peft_model(
                model, M2PTConfig(num_visual_tokens=9, num_textual_tokens=0, tune_connector=False)
            )
        layer = f"{path}.{norm.rpartition('.')[0]}."
        (prompt,) = [prompt for name, prompt in prompts_of(peft_model).items() if name.startswith(layer)]
        torch.testing.assert_close(prompt(), seen[0].flatten(0, -2)[:9])

    def test_images_with_too_few_tokens(self):
        """A blank image has five tokens, and images of noise are beside it."""
        rows = {}
        for num_visual_tokens in (4, 5, 12):
            peft_model = get_peft_model(make_llava(), config(num_visual_tokens=num_visual_tokens))
            prompt = prompts_of(peft_model)["model.vision_tower.encoder.layers.1.self_attn.m2pt_prompt"]
            rows[num_visual_tokens] = prompt()
        assert torch.equal(rows[5][:4], rows[4])
        torch.testing.assert_close(rows[12][:5], rows[5])
        # No row is there twice.
        assert torch.cdist(rows[12], rows[12]).fill_diagonal_(1).min() > 1e-2

    def test_encoders_for_which_no_image_is_known(self):
        model = make_llava()
        model.model.vision_tower.config.image_size = None
        with pytest.warns(UserWarning, match="vision encoder 'model.vision_tower'.* Visual prompts start at random"):
            peft_model = get_peft_model(model, config())
        assert all(prompt().any() for prompt in prompts_of(peft_model).values())

    def test_visual_prompts_alone(self):
        peft_model = get_peft_model(make_llava(), config(num_textual_tokens=0, num_interaction_tokens=0))
        assert all(prompt.scale is not None for prompt in prompts_of(peft_model).values())

    @pytest.mark.parametrize("training", [True, False])
    def test_the_model_is_left_as_it_was(self, training):
        model = make_llava()
        model.train(training)
        model.model.language_model.layers[1].train(not training)
        flags = {name: module.training for name, module in model.named_modules()}
        weights = {name: weight.clone() for name, weight in model.state_dict().items()}
        for layer in model.model.language_model.layers:
            layer.self_attn.attention_dropout = 0.9
        peft_model = get_peft_model(model, config())
        prompts = {name: prompt for name, prompt in prompts_of(peft_model).items() if "m2pt_prompt" in name}
        unloaded = peft_model.unload()
        assert {name: module.training for name, module in unloaded.named_modules()} == flags
        assert all(torch.equal(weight, weights[name]) for name, weight in unloaded.state_dict().items())
        for module in unloaded.modules():
            assert not module._forward_pre_hooks and not module._forward_hooks
        # Dropout has no say in what states are.
        expected = prompts_of(get_peft_model(make_llava(), config()))
        assert len(prompts) == 3 + 3
        assert all(torch.equal(prompt(), expected[name]()) for name, prompt in prompts.items())

    def test_random_numbers_are_drawn_as_before(self):
        model = make_llava()
        # Some models draw numbers whenever they are called.
        drawn = []
        model.model.language_model.norm.register_forward_hook(lambda *args: drawn.append(torch.rand(7)))
        torch.manual_seed(5)
        get_peft_model(model, only_text())
        after = torch.rand(3)
        torch.manual_seed(5)
        assert drawn and torch.equal(after, torch.rand(3))

    def test_a_second_adapter(self):
        """It starts as what the model is without the first one, which stays active."""
        peft_model = get_peft_model(make_llava(), config())
        expected = {name: prompt().clone() for name, prompt in prompts_of(peft_model).items()}
        randomise(peft_model, seed=3)
        logits = peft_model(**make_inputs()).logits
        peft_model.add_adapter("second", config())
        assert torch.equal(peft_model(**make_inputs()).logits, logits)
        for name, prompt in prompts_of(peft_model, "second").items():
            if "m2pt_interaction" not in name:
                assert torch.equal(prompt(), expected[name]), name

    def test_a_base_that_is_offloaded(self):
        expected = prompts_of(get_peft_model(make_llava(), config()))
        peft_model = get_peft_model(cpu_offload(make_llava(), execution_device="cpu"), config())
        for name, prompt in prompts_of(peft_model).items():
            if "m2pt_interaction" not in name:
                assert torch.equal(prompt(), expected[name]()), name

    def test_without_data(self, monkeypatch):
        forbid(monkeypatch)
        peft_model = get_peft_model(make_llava().to("meta"), config())
        assert all(parameter.is_meta for parameter in trained_by(peft_model).values())
        peft_model = get_peft_model(make_llava(), config(), low_cpu_mem_usage=True)
        assert all(prompt.weight.is_meta for prompt in prompts_of(peft_model).values())
        assert "would train" in inspect_model(make_llava())


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
    def test_kept_rows_notice_a_change_of_units(self):
        peft_model = get_peft_model(make_llava(), config())
        input_ids = make_inputs(images=False)["input_ids"]
        cache = cache_of(peft_model(input_ids, use_cache=True))
        peft_model(input_ids[:, :1], **on_top_of(cache))
        fresh, fresh_cache = copy.deepcopy(peft_model), copy.deepcopy(cache)
        for model in (peft_model, fresh):
            for prompt in prompts_of(model).values():
                prompt.scale[1:].mul_(-4)
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


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


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
        expected = "unit of the textual prompt of layer 1 .*expected shape \\[3, 1\\], found "
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
        with pytest.raises(ValueError, match=r"unit of the visual prompt of layer 0 .*found nothing"):
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


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Words "w3" to "w95", and a token that begins every text."""
    folder = tmp_path_factory.mktemp("tokenizer")
    words = {"<pad>": 0, "<s>": 1, **{f"w{i}": i for i in range(2, VOCAB_SIZE + 3)}}
    model = Tokenizer(WordLevel(words, unk_token="<pad>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", bos_token="<s>").save_pretrained(folder)
    return str(folder)


UNREADABLE = {
    "florence2": r"'model.language_model' \(BartModel\) belongs to an encoder and a decoder.*Leave init_text",
    "diffusion_gemma": r"\(DiffusionGemmaDecoderModel\) takes no input_ids.*Leave init_text",
    "idefics": r"'model' \(IdeficsModel\) cannot read a text by itself: Exactly 1 of pixel_values.*Leave init_text",
}


class TestTheModelsOwnText:
    """Without a text in the config."""

    @torch.no_grad()
    def written_by(self, model, num_tokens, beginning=1):
        """Greedy search over ordinary tokens: no beginnings, ends, padding, or images."""
        tokens = [beginning]
        while len(tokens) < num_tokens:
            scores = model(torch.tensor([tokens])).logits[0, -1]
            scores[[0, 1, 2, 96]] = -torch.inf
            tokens.append(scores.argmax().item())
        return tokens

    @pytest.mark.parametrize("num_textual_tokens", [1, 7])
    def test_is_what_it_takes_for_likeliest(self, num_textual_tokens):
        tokens = self.written_by(make_llava(), num_textual_tokens)
        peft_model = get_peft_model(make_llava(), M2PTConfig(num_textual_tokens=num_textual_tokens))
        states = tower_states(make_llava(), tokens)
        for i in range(3):
            prompt = prompts_of(peft_model)[f"model.language_model.layers.{i}.self_attn.m2pt_prompt"]
            torch.testing.assert_close(prompt(), states[i])

    def test_is_the_same_for_every_seed(self):
        prompts = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            prompts.append(prompts_of(get_peft_model(make_llava(), M2PTConfig())))
        assert all(torch.equal(prompt(), prompts[1][name]()) for name, prompt in prompts[0].items())

    def test_without_a_token_to_begin_with(self, monkeypatch):
        """What ends texts is a boundary too."""
        without = lambda **kwargs: LlamaConfig(**{**kwargs, "bos_token_id": None, "eos_token_id": [2, 7]})  # noqa: E731
        monkeypatch.setitem(TEXT, "llama", without)
        model = make_llava()
        model.generation_config.bos_token_id = None
        peft_model = get_peft_model(model, only_text(init_token_ids=None))
        prompt = prompts_of(peft_model)["model.language_model.layers.0.self_attn.m2pt_prompt"]
        torch.testing.assert_close(prompt()[0], model.get_input_embeddings().weight[2])

    def test_without_an_output(self):
        """The likeliest token is the one whose embedding the last state points at."""
        body = make_llava().model
        embeddings = body.get_input_embeddings().weight
        state = body.language_model(torch.tensor([[1]])).last_hidden_state[0, -1]
        scores = embeddings @ state
        scores[[0, 1, 2, 96]] = -torch.inf
        prompt = prompts_of(get_peft_model(body, only_text(init_token_ids=None)))[
            "language_model.layers.0.self_attn.m2pt_prompt"
        ]
        torch.testing.assert_close(prompt()[1], embeddings[scores.argmax()])

    @pytest.mark.parametrize(
        "family", [f for f in FAMILIES if f.is_known and f.name in UNREADABLE], ids=lambda f: f.name
    )
    def test_models_that_cannot_write(self, family):
        """Their prompts start at random, and are told from those of others."""
        reason = UNREADABLE[family.name].removesuffix(".*Leave init_text")
        model = of_families.make_model(family, "sdpa")
        with pytest.warns(UserWarning, match=f"{reason}.*Textual prompts start at random, as with 'xavier_uniform'"):
            peft_model = get_peft_model(model, only_text(init_token_ids=None))
        for prompt in prompts_of(peft_model).values():
            bound = math.sqrt(6 / (4 * prompt.width))
            assert 0 < prompt().abs().max() <= bound and prompt.scale is not None


class TestText:
    def test_the_tokenizer_of_the_base_model(self, tokenizer, tmp_path):
        model = make_llava()
        model.name_or_path = tokenizer
        expected = prompts_of(get_peft_model(make_llava(), only_text(init_token_ids=[1, 60, 7])))
        for peft_model in (
            get_peft_model(model, only_text(init_text="w60 w7")),
            get_peft_model(make_llava(), only_text(init_text="w60 w7", tokenizer_name_or_path=tokenizer)),
        ):
            assert all(torch.equal(prompt(), expected[name]()) for name, prompt in prompts_of(peft_model).items())
        peft_model.save_pretrained(tmp_path)
        saved = M2PTConfig.from_pretrained(tmp_path)
        assert (saved.init_text, saved.tokenizer_name_or_path) == ("w60 w7", tokenizer)
        # Nobody who loads the adapter needs the tokenizer; who adds one like it does.
        change_config(tmp_path, tokenizer_name_or_path="/nowhere")
        loaded = PeftModel.from_pretrained(make_llava(), tmp_path)
        assert all(torch.equal(prompt(), expected[name]()) for name, prompt in prompts_of(loaded).items())
        with pytest.raises(ValueError, match="tokenizer, and that of '/nowhere' cannot be loaded"):
            loaded.add_adapter("new", loaded.peft_config["default"])

    @pytest.mark.parametrize(
        "kwargs, message",
        [
            (
                {"init_text": "w60"},
                r"init_text='w60' has 2 tokens, .* num_textual_tokens=3: .* num_textual_tokens=2, or",
            ),
            ({"init_text": "w60 w7 w8"}, r"init_text='w60 w7 w8' has 4 tokens, .* or choose a text of 3 tokens"),
            ({"init_text": "w60 w98"}, "init_text='w60 w98': token 98 has no embedding in the model, which has 97"),
            ({"init_token_ids": [5, 6, 97]}, "init_token_ids: token 97 has no embedding in the model, which has 97"),
        ],
    )
    def test_texts_that_do_not_fit(self, tokenizer, kwargs, message):
        model = make_llava()
        model.name_or_path = tokenizer
        modules = list(model.modules())
        with pytest.raises(ValueError, match=message):
            get_peft_model(model, only_text(**kwargs))
        assert all(module is before for module, before in zip(model.modules(), modules, strict=True))

    @pytest.mark.parametrize("name", ["", "/nowhere"])
    def test_no_tokenizer(self, name):
        model = make_llava()
        model.name_or_path = name
        what = f"that of '{name}' cannot be loaded" if name else "the model does not say where it comes from"
        with pytest.raises(ValueError, match=rf"{what}(.|\n)*tokenizer_name_or_path='...', or .* init_token_ids="):
            get_peft_model(model, only_text(init_text="w60 w7"))
        get_peft_model(model, only_text(init_text="w60 w7"), low_cpu_mem_usage=True)

    @pytest.mark.parametrize(
        "values, message",
        [
            ({"init_text": ""}, "init_text='' is neither a string nor None"),
            ({"init_text": 3}, "init_text=3 is neither a string nor None"),
            ({"init_token_ids": "abc"}, "init_token_ids='abc' is not a list of the ids of tokens"),
            ({"init_token_ids": [1, -1]}, "init_token_ids=[1, -1] is not a list of the ids of tokens"),
            ({"init_token_ids": [1, 2.0]}, "init_token_ids=[1, 2.0] is not a list of the ids of tokens"),
            ({"init_token_ids": [1, 2]}, "init_token_ids has 2 tokens, but num_textual_tokens=10"),
            ({"init_token_ids": [1], "init_text": "a"}, "init_text and init_token_ids are both given"),
            (
                {"init_text": "a", "init_prompts": "normal"},
                "init_text says what textual prompts start as, but init_pr",
            ),
            (
                {"init_text": "a", "num_textual_tokens": 0},
                "init_text says what textual prompts start as, but num_text",
            ),
            ({"tokenizer_name_or_path": "a"}, "tokenizer_name_or_path names the tokenizer for init_text, which is no"),
        ],
        ids=str,
    )
    def test_bad_values(self, values, message):
        with pytest.raises(ValueError) as error:
            M2PTConfig(**{"init_prompts": "states", **values})
        assert message in str(error.value)

    @pytest.mark.parametrize(
        "family", [f for f in FAMILIES if f.is_known and f.name in UNREADABLE], ids=lambda f: f.name
    )
    def test_models_that_cannot_read_a_text_alone(self, family):
        message = UNREADABLE[family.name]
        model = of_families.make_model(family, "sdpa")
        training = [module.training for module in model.modules()]
        with pytest.raises(UnsupportedModelError, match=message):
            get_peft_model(model, only_text())
        assert [module.training for module in model.modules()] == training
        assert not any(module._forward_pre_hooks for module in model.modules())

    def test_states_that_are_not_finite(self):
        model = make_llava().half()
        with torch.no_grad():
            model.get_input_embeddings().weight[TOKENS[1]] = 6e4
            model.model.language_model.layers[0].mlp.down_proj.weight.mul_(1e4)
        with pytest.raises(
            UnsupportedModelError, match="not finite at 'model.language_model.layers.*in torch.float16"
        ):
            get_peft_model(model, only_text())

    def test_the_paper_has_no_units(self):
        peft_model = get_peft_model(make_llava(), M2PTConfig.paper(4, 3))
        assert all(prompt.scale is None for prompt in prompts_of(peft_model).values())
