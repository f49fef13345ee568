"""Prompts that start as the states of a text, or of a blank image."""

import math
import warnings

import pytest
import torch
from accelerate import cpu_offload
from families import FAMILIES
from families import spec as of_families
from helpers.models import TEXT, make_inputs, make_llava, randomise, trained_by, without_labels
from helpers.states import TOKENS, config, forbid, make_base, only_text, prompts_of, tower_states, turns_of
from peft import LoraConfig, get_peft_model

from peft_m2pt import M2PTConfig
from peft_m2pt.layers.prompt import scale_of
from peft_m2pt.tools.inspection import inspect_model


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
        assert scale_of(torch.tensor(rows), 1).item() == unit
        assert scale_of(torch.tensor(rows), 8).item() in (unit, 8 * unit)

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
