"""Names of weights and modules: those of the base model and of other adapters stay as they are."""

import copy
import pickle

import pytest
import torch
import transformers
from helpers import adapter_methods
from helpers.lora import add_lora, randomise_lora
from helpers.models import adapt, make_config, make_inputs, make_llava, randomise
from helpers.peft_suites import make_llama
from packaging.version import Version
from peft import (
    AdaLoraConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from transformers import LlavaForConditionalGeneration, Trainer, TrainingArguments

from peft_m2pt import M2PTConfig
from peft_m2pt.adapted import layer_of
from peft_m2pt.layers.base import M2PTLayer


INPUTS = make_inputs()


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(**INPUTS).logits


def plain_lora(targets="all-linear"):
    """What LoRA alone computes, and is saved as."""
    lora = add_lora(make_llava(), targets)
    return logits(lora), get_peft_model_state_dict(lora, adapter_name="lora")


def own(names):
    return {name for name in names if "m2pt_" in name}


def test_names_of_the_base_model():
    plain = make_llava()
    model = make_llava()
    peft_model = adapt(model)
    for names_of in (
        lambda model: [name for name, _ in model.named_parameters()],
        lambda model: [name for name, _ in model.named_buffers()],
        lambda model: list(model.state_dict()),
    ):
        names = names_of(model)
        assert set(names) - own(names) == set(names_of(plain))
        assert len(names) == len(set(names))
    assert list(peft_model.state_dict()) == [f"base_model.model.{name}" for name in model.state_dict()]
    names = {name for name, _ in model.named_modules()}
    assert {name for name, _ in plain.named_modules()} <= names
    for name, parameter in model.named_parameters():
        assert model.get_parameter(name) is parameter
    for name, module in model.named_modules():
        found = model.get_submodule(name)
        assert found is module or layer_of(found) is module
    peft_model.unload()
    assert list(model.state_dict()) == list(plain.state_dict())


def walk(module, prefix=""):
    """Names of weights as DeepSpeed and accelerate find them, from child to child."""
    for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        if name not in module._non_persistent_buffers_set:
            yield prefix + name
    for name, child in module.named_children():
        yield from walk(child, f"{prefix}{name}.")


class Sinks(nn.Linear):
    """A connector that is one linear layer, with weights of its own."""

    def __init__(self):
        super().__init__(32, 48)
        self.register_buffer("mean", torch.zeros(48))
        self.register_buffer("passing", torch.zeros(48), persistent=False)


def with_one_linear_connector():
    model = make_llava()
    torch.manual_seed(3)
    model.model.multi_modal_projector = Sinks()
    return model


@pytest.mark.parametrize("make", [make_llava, with_one_linear_connector])
@pytest.mark.parametrize("has_lora", [False, True])
def test_all_who_name_weights_agree(make, has_lora):
    model = make()
    if has_lora:
        add_lora(model, "all-linear")
        # The connector itself may be what LoRA adapts.
        assert any("multi_modal_projector" in name for name, _ in model.named_modules() if name.endswith("lora_A"))
    before = set(model.state_dict())
    get_peft_model(model, make_config(num_interaction_tokens=0), adapter_name="m2pt")
    names = set(model.state_dict())
    assert names - own(names) == before
    assert {name for name, _ in model.named_parameters()} <= names
    buffers = {name for name, _ in model.named_buffers()}
    assert names == {name for name, _ in model.named_parameters()} | {name for name in buffers if name in names}
    assert set(walk(model)) == names
    assert set(get_model_state_dict(model)) == names


@pytest.mark.parametrize("make", [make_llava, with_one_linear_connector])
@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_of_the_base_model_load(make, assign):
    peft_model = adapt(make(), tune_connector=False, num_interaction_tokens=0)
    model = peft_model.get_base_model()
    weights = {name: 1.1 * weight for name, weight in make().state_dict().items()}
    result = model.load_state_dict(copy.deepcopy(weights), strict=False, assign=assign)
    assert set(result.missing_keys) == own(model.state_dict()) and not result.unexpected_keys
    after = model.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in weights.items())
    expected = make()
    expected.load_state_dict(weights)
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model), logits(expected))


def test_what_does_not_fit_is_named():
    model = adapt(make_llava()).get_base_model()
    weights = model.state_dict()
    prompt = next(name for name in weights if "m2pt_prompt" in name)
    attention = prompt.partition(".m2pt_prompt")[0]
    weight = weights.pop(f"{attention}.q_proj.weight")
    del weights[prompt]
    weights[f"{attention}.unknown.weight"] = weight
    weights[f"{attention}.out_proj.weight"] = weight[:1]
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(weights)
    message = str(error.value)
    for name in (f"{attention}.q_proj.weight", prompt, f"{attention}.unknown.weight", f"{attention}.out_proj.weight"):
        assert name in message
    assert "base_layer" not in message


@pytest.mark.parametrize("full", [False, True])
def test_distributed_checkpoints(full):
    options = StateDictOptions(full_state_dict=full)
    peft_model = adapt(add_lora(make_llava(), "all-linear"), "m2pt")
    weights = {name: weight.clone() for name, weight in get_model_state_dict(peft_model, options=options).items()}
    other = adapt(add_lora(make_llava(), "all-linear"), "m2pt")
    randomise(other, seed=9)
    assert not torch.equal(logits(other), logits(peft_model))
    set_model_state_dict(other, weights, options=options)
    assert torch.equal(logits(other), logits(peft_model))


def by_peft(targets):
    lora = add_lora(make_llava(), targets)
    return lora, adapt(lora, "m2pt")


def by_peft_in_one(targets):
    peft_model = adapt(add_lora(make_llava(), targets).get_base_model(), "m2pt")
    return peft_model, peft_model


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], r".*self_attn\.k_proj"], ids=str)
@pytest.mark.parametrize("make", [by_peft, by_peft_in_one])
def test_lora_is_saved_as_if_it_were_alone(tmp_path, targets, make):
    expected, weights = plain_lora(targets)
    lora, stack = make(targets)
    with_both = logits(stack)
    assert not torch.equal(expected, with_both)
    for number, model in enumerate({id(lora): lora, id(stack): stack}.values()):
        folder = tmp_path / str(number)
        model.save_pretrained(folder)
        saved = load_peft_weights(folder / "lora")
        assert saved.keys() == weights.keys() and all(torch.equal(saved[name], weights[name]) for name in saved)
        assert torch.equal(logits(PeftModel.from_pretrained(make_llava(), folder / "lora")), expected)
        # Both again, LoRA first or M2PT alone at first.
        loaded = PeftModel.from_pretrained(make_llava(), folder / "lora", adapter_name="lora")
        loaded = PeftModel.from_pretrained(loaded, folder / "m2pt", adapter_name="m2pt")
        loaded.base_model.set_adapter(["lora", "m2pt"])
        torch.testing.assert_close(logits(loaded), with_both, atol=1e-5, rtol=1e-5)
        alone = PeftModel.from_pretrained(make_llava(), folder / "m2pt")
        assert torch.equal(logits(alone), logits(adapt(make_llava())))
    # What is loaded into a stack arrives.
    randomise_with(stack, 0.0)
    set_peft_model_state_dict(stack, load_peft_weights(tmp_path / "0" / "lora"), adapter_name="lora")
    set_peft_model_state_dict(stack, load_peft_weights(tmp_path / "0" / "m2pt"), adapter_name="m2pt")
    assert torch.equal(logits(stack), with_both)
    stack.delete_adapter("m2pt")
    assert torch.equal(logits(stack), expected) and stack.active_adapters == ["lora"]
    stack.save_pretrained(tmp_path / "rest")
    assert torch.equal(logits(PeftModel.from_pretrained(make_llava(), tmp_path / "rest" / "lora")), expected)


def test_lora_that_comes_second(tmp_path):
    targets = ["up_proj", "down_proj"]
    expected, weights = plain_lora(targets)
    m2pt = adapt(make_llava(), "m2pt")
    lora = add_lora(m2pt.get_base_model(), targets)
    lora.save_pretrained(tmp_path)
    assert load_peft_weights(tmp_path / "lora").keys() == weights.keys()
    assert torch.equal(logits(PeftModel.from_pretrained(make_llava(), tmp_path / "lora")), expected)
    loaded = PeftModel.from_pretrained(make_llava(), tmp_path / "m2pt")
    assert torch.equal(logits(loaded), logits(adapt(make_llava())))
    around = add_lora(adapt(make_llava(), "m2pt"), targets)
    both = logits(around)
    message = r"LoraModel wraps that of M2PTModel.*Save them with model.get_base_model\(\)\.save_pretrained"
    with pytest.raises(ValueError, match=message):
        around.save_pretrained(tmp_path / "around")
    around.get_base_model().save_pretrained(tmp_path / "around")
    loaded = PeftModel.from_pretrained(make_llava(), tmp_path / "around" / "lora")
    assert torch.equal(logits(loaded), expected)
    loaded = PeftModel.from_pretrained(loaded, tmp_path / "around" / "m2pt", adapter_name="m2pt")
    loaded.base_model.set_adapter(["default", "m2pt"])
    torch.testing.assert_close(logits(loaded), both, atol=1e-5, rtol=1e-5)


def test_a_method_that_computes_something_itself(tmp_path):
    config = AdaLoraConfig(target_modules=["q_proj", "v_proj"], total_step=10)
    inner = get_peft_model(make_llava(), config, adapter_name="ada")
    randomise_lora(inner)
    expected = logits(inner)
    # It adds to the loss, in its own forward.
    stack = adapt(inner, "m2pt")
    assert stack.get_base_model() is inner
    with pytest.warns(UserWarning, match=r"Save them with model.get_base_model\(\)\.save_pretrained"):
        stack.save_pretrained(tmp_path, selected_adapters=["m2pt"])
    stack.get_base_model().save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(make_llava(), tmp_path / "m2pt")), logits(adapt(make_llava())))
    assert torch.equal(logits(PeftModel.from_pretrained(make_llava(), tmp_path / "ada")), expected)


def test_activated_lora_is_refused():
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[5])
    lora = get_peft_model(make_llava(), config, adapter_name="activated")
    with pytest.raises(ValueError, match=r"'activated' has alora_invocation_tokens=\[5\].* without it"):
        adapt(lora, "m2pt")


def test_deleting_lora_from_a_stack():
    stack = adapt(add_lora(make_llava(), "all-linear"), "m2pt")
    stack.delete_adapter("lora")
    assert torch.equal(logits(stack), logits(adapt(make_llava()))) and stack.active_adapters == ["m2pt"]


def randomise_with(model, factor):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "m2pt_" in name:
                parameter.mul_(factor)


def test_saving_a_stack_by_names_of_adapters(tmp_path):
    # The adapter whose name is "default" stands in the folder itself.
    stack = adapt(add_lora(make_llava(), "all-linear", "default"), "second")
    stack.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(make_llava(), tmp_path)), plain_lora()[0])
    assert torch.equal(
        logits(PeftModel.from_pretrained(make_llava(), tmp_path / "second")), logits(adapt(make_llava()))
    )


def inject_both():
    model = make_llava()
    inject_adapter_in_model(LoraConfig(r=4, target_modules="all-linear"), model, "lora")
    inject_adapter_in_model(make_config(), model, "m2pt")
    randomise_lora(model)
    randomise(model, seed=2)
    return model


def test_saving_what_was_injected():
    model = inject_both()
    expected, weights = plain_lora()
    saved = get_peft_model_state_dict(model, adapter_name="lora")
    assert {f"base_model.model.{name}" for name in saved} == weights.keys()
    lora = add_lora(make_llava(), "all-linear", "default")
    randomise_with(lora, 0.0)
    set_peft_model_state_dict(lora, saved)
    assert torch.equal(logits(lora), expected)
    m2pt = adapt(make_llava())
    expected = logits(m2pt)
    randomise_with(m2pt, 0.0)
    set_peft_model_state_dict(m2pt, get_peft_model_state_dict(model, adapter_name="m2pt"))
    assert torch.equal(logits(m2pt), expected)


@adapter_methods.needs_adapter_methods
def test_saving_by_transformers(tmp_path):
    expected, weights = plain_lora()
    model = make_llava()
    model.add_adapter(LoraConfig(r=4, target_modules="all-linear"), "lora")
    model.add_adapter(make_config(), "m2pt")
    randomise_lora(model)
    randomise(model, seed=2)
    for when in ("beside M2PT", "after delete_adapter"):
        for name in list(model.peft_config):
            model.set_adapter(name)
            folder = tmp_path / when / name
            model.save_pretrained(folder)
            loaded = PeftModel.from_pretrained(make_llava(), folder)
            assert torch.equal(logits(loaded), expected if name == "lora" else logits(adapt(make_llava())))
            by_transformers = make_llava()
            by_transformers.load_adapter(folder)
            assert torch.equal(logits(by_transformers), logits(loaded))
        assert load_peft_weights(tmp_path / when / "lora").keys() == weights.keys()
        if "m2pt" in model.peft_config:
            model.delete_adapter("m2pt")


@pytest.mark.parametrize("inject", [adapt, lambda model: inject_adapter_in_model(make_config(), model)])
def test_the_base_model_is_saved_under_its_own_names(tmp_path, inject):
    model = make_llava()
    expected = logits(model)
    inject(model)
    model.save_pretrained(tmp_path)
    loaded, info = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert torch.equal(logits(loaded), expected)
    assert not info["missing_keys"] and set(info["unexpected_keys"]) == own(model.state_dict())


@adapter_methods.needs_adapter_methods
def test_the_base_model_after_delete_adapter(tmp_path):
    model = make_llava()
    expected = logits(model)
    model.add_adapter(make_config(), "m2pt")
    model.delete_adapter("m2pt")
    model.save_pretrained(tmp_path)
    loaded, info = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert torch.equal(logits(loaded), expected) and not any(info.values())


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_keep_names_and_weights_together(duplicate):
    peft_model = adapt(with_one_linear_connector(), tune_connector=False, num_interaction_tokens=0)
    twin = duplicate(peft_model)
    assert list(twin.state_dict()) == list(peft_model.state_dict())
    attention = twin.get_base_model().model.language_model.layers[0].self_attn
    layer = layer_of(attention)
    assert layer.base_layer is attention and layer.m2pt_prompt is attention.m2pt_prompt
    twin.train()
    assert attention.training and layer.training and layer.m2pt_prompt.training
    twin.to(torch.float64)
    assert {parameter.dtype for parameter in twin.get_base_model().parameters()} == {torch.float64}


def test_adapted_modules_are_what_they_were():
    model = make_llava()
    attention = model.model.language_model.layers[0].self_attn
    kind, names = type(attention), list(vars(attention))
    hooked = []
    attention.register_forward_hook(lambda module, args, output: hooked.append(module))
    peft_model = adapt(model)
    assert model.model.language_model.layers[0].self_attn is attention and isinstance(attention, kind)
    assert type(attention).__name__ == kind.__name__ and repr(attention).startswith(f"{kind.__name__}(")
    assert not isinstance(attention, M2PTLayer)
    assert dict(model.named_modules())["model.language_model.layers.0.self_attn"] is attention
    logits(peft_model)
    assert hooked == [attention]
    decoder = model.model.language_model
    rows = torch.randn(1, 5, 48)
    mask = torch.full((5, 5), torch.finfo(torch.float32).min).triu(1)[None, None]
    arguments = {"position_embeddings": decoder.rotary_emb(rows, torch.arange(5)[None]), "attention_mask": mask}
    without = make_llava().model.language_model.layers[0].self_attn(rows, **arguments)[0]
    assert torch.equal(attention.base_layer(rows, **arguments)[0], without)
    assert (attention(rows, **arguments)[0] - without).abs().max() > 0.1
    peft_model.unload()
    assert type(attention) is kind and list(vars(attention)) == names


def test_parts_that_are_replaced():
    peft_model, expected = adapt(make_llava()), adapt(make_llava())
    for model in (peft_model, expected):
        q_proj = model.get_base_model().model.language_model.layers[0].self_attn.q_proj
        doubled = nn.Linear(48, 48, bias=False)
        doubled.weight.data = 2 * q_proj.weight.data
        if model is peft_model:
            model.get_base_model().set_submodule("model.language_model.layers.0.self_attn.q_proj", doubled)
        else:
            q_proj.weight.data = doubled.weight.data
    assert torch.equal(logits(peft_model), logits(expected))


def test_parts_of_an_attention_are_trained_besides(tmp_path):
    def scaled(model, part):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "k_proj" in name and part in name:
                    parameter.mul_(1.5)
        return model

    peft_model = scaled(adapt(make_llava(), modules_to_save=["k_proj"]), "modules_to_save")
    torch.testing.assert_close(logits(peft_model), logits(adapt(scaled(make_llava(), "k_proj"))), atol=1e-5, rtol=1e-5)
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model), logits(make_llava()))
    peft_model.save_pretrained(tmp_path)
    names = [name for name in load_peft_weights(tmp_path) if "m2pt_" not in name]
    assert "base_model.model.model.language_model.layers.0.self_attn.k_proj.weight" in names
    loaded = PeftModel.from_pretrained(make_llava(), tmp_path)
    assert torch.equal(logits(loaded), logits(peft_model))
    assert list(peft_model.unload().state_dict()) == list(make_llava().state_dict())


def rows():
    ids, mask, labels, images = (INPUTS[name] for name in ("input_ids", "attention_mask", "labels", "pixel_values"))
    return [
        {"input_ids": ids[i], "attention_mask": mask[i], "labels": labels[i], "pixel_values": images[i]}
        for i in (0, 1)
    ]


def test_prompt_tuning_stays_below_m2pt():
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    tokens = torch.tensor([[1, 5, 6, 7]])
    prompt_tuned = get_peft_model(make_llama(), config, adapter_name="prompt")
    expected = prompt_tuned(tokens).logits
    stack = get_peft_model(prompt_tuned, M2PTConfig(num_visual_tokens=0), adapter_name="m2pt")
    assert stack(tokens).logits.shape == expected.shape == (1, 3 + 4, 97)
    stack.base_model.disable_adapter_layers()
    assert torch.equal(stack(tokens).logits, expected)
    assert stack.unload() is prompt_tuned


def make_trainer(model, folder, **kwargs):
    arguments = {
        "save_strategy": "steps",
        "eval_strategy": "steps",
        "save_steps": 1,
        "eval_steps": 1,
        "max_steps": 2,
        "learning_rate": 0.1,
        "load_best_model_at_end": True,
        **kwargs,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(folder, report_to=[], use_cpu=True, disable_tqdm=True, seed=3, **arguments),
        train_dataset=rows(),
        eval_dataset=rows(),
    )


def losses_of(trainer):
    return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


@pytest.mark.parametrize("names", [("lora", "m2pt"), ("default", "m2pt"), ("lora", "default")], ids=str)
def test_a_stack_in_trainer(tmp_path, names):
    def make():
        return adapt(add_lora(make_llava(), "all-linear", names[0]), names[1])

    trainer = make_trainer(make(), tmp_path / "run", load_best_model_at_end=False)
    trainer.train()
    losses = losses_of(trainer)
    assert len(losses) == 2
    resumed = make_trainer(make(), tmp_path / "run", load_best_model_at_end=False)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    # Before, transformers did not look for an adapter "default" beside others in a checkpoint.
    if "default" not in names or Version(transformers.__version__) >= Version("5.23"):
        assert resumed.evaluate()["eval_loss"] == pytest.approx(losses[1], rel=1e-5)

    checkpoint = tmp_path / "run" / "checkpoint-2"
    folders = [checkpoint if name == "default" else checkpoint / name for name in names]
    assert load_peft_weights(folders[0]).keys() == plain_lora()[1].keys()
    loaded = PeftModel.from_pretrained(make_llava(), folders[0], adapter_name="first")
    loaded = PeftModel.from_pretrained(loaded, folders[1], adapter_name="second")
    loaded.base_model.set_adapter(["first", "second"])
    torch.testing.assert_close(logits(loaded), logits(resumed.model), atol=1e-4, rtol=1e-4)


def test_the_best_model_of_a_stack(tmp_path):
    add_lora(make_llava(), "all-linear").save_pretrained(tmp_path)
    lora = PeftModel.from_pretrained(make_llava(), tmp_path / "lora", adapter_name="lora")
    # The best model is to be another than the last.
    trainer = make_trainer(adapt(lora), tmp_path, metric_for_best_model="eval_loss", greater_is_better=True)
    trainer.train()
    losses = losses_of(trainer)
    assert losses[0] > losses[1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("arguments", [{}, {"remove_unused_columns": False}], ids=str)
def test_trainer_knows_the_columns_and_labels_of_a_stack(tmp_path, arguments):
    arguments |= {"save_strategy": "no", "load_best_model_at_end": False}
    alone = make_trainer(adapt(make_llava()), tmp_path, **arguments)
    stack = make_trainer(adapt(add_lora(make_llava(), "all-linear"), "m2pt"), tmp_path, **arguments)
    assert stack.label_names == alone.label_names == ["labels"]
    assert "eval_loss" in stack.evaluate()
