"""Where weights are, and in which precision: bases that are offloaded to CPU or disk, or have no weights yet."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from helpers.models import adapt, make_config, make_inputs, make_llava, trained_by, without_labels
from peft import PeftConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from torch import nn
from transformers import LlavaForConditionalGeneration

from peft_m2pt import UnsupportedModelError


ON_DISK = {
    "model.vision_tower": "disk",
    "model.multi_modal_projector": "disk",
    "model.language_model": "disk",
    "lm_head": "cpu",
}
ADAPTERS = {
    "copy": {},
    "low rank": {"connector_rank": 4},
    "frozen connector": {"tune_connector": False},
    "image": {"interaction_placement": "image"},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_llava().save_pretrained(folder)
    return folder


def load(placement, saved, folder):
    if placement == "cpu":
        return cpu_offload(make_llava(), execution_device="cpu")
    if placement == "cpu, buffers too":
        return cpu_offload(make_llava(), execution_device="cpu", offload_buffers=True)
    device_map = {"": "cpu"} if placement == "one device" else ON_DISK
    return LlavaForConditionalGeneration.from_pretrained(saved, device_map=device_map, offload_folder=folder).eval()


def inputs_for(kwargs):
    return make_inputs(num_image_tokens=6 if kwargs.get("interaction_placement") == "image" else 4)


def take_over(peft_model, expected):
    with torch.no_grad():
        for name, parameter in trained_by(expected).items():
            trained_by(peft_model)[name].copy_(parameter)


@pytest.mark.parametrize("kwargs", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("placement", ["one device", "cpu", "cpu, buffers too", "disk"])
def test_a_base_that_is_offloaded(saved, tmp_path, placement, kwargs):
    inputs = inputs_for(kwargs)
    expected = adapt(make_llava(), **kwargs)
    peft_model = adapt(load(placement, saved, tmp_path / "offload"), **kwargs)
    assert {str(parameter.device) for parameter in trained_by(peft_model).values()} == {"cpu"}
    take_over(peft_model, expected)

    outputs, expected_outputs = peft_model(**inputs), expected(**inputs)
    assert torch.equal(outputs.logits, expected_outputs.logits)
    outputs.loss.backward()
    expected_outputs.loss.backward()
    for name, parameter in trained_by(peft_model).items():
        assert torch.equal(parameter.grad, trained_by(expected)[name].grad), name
    arguments = {**without_labels(inputs), "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(peft_model.generate(**arguments), expected.generate(**arguments))

    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llava(), tmp_path)
    assert torch.equal(loaded(**inputs).logits, expected_outputs.logits)
    with peft_model.disable_adapter():
        assert torch.equal(peft_model(**make_inputs()).logits, make_llava()(**make_inputs()).logits)
    assert torch.equal(peft_model.unload()(**make_inputs()).logits, make_llava()(**make_inputs()).logits)


@pytest.mark.parametrize("placement", ["one device", "cpu", "disk"])
def test_the_copy_of_an_offloaded_connector_is_one(saved, tmp_path, placement):
    model = get_peft_model(load(placement, saved, tmp_path), make_config())
    projector = make_llava().model.multi_modal_projector
    parts = {name: weight for name, weight in trained_by(model).items() if "m2pt_connector" in name}
    assert len(parts) == 4
    for name, weight in parts.items():
        _, _, part = name.partition("m2pt_connector_")
        assert torch.equal(weight, projector.get_parameter(part.replace(".default.", "."))), name


def test_vocabulary_on_disk(saved, tmp_path):
    embeddings = make_llava().get_input_embeddings().weight
    peft_model = get_peft_model(load("disk", saved, tmp_path), make_config(init_prompts="vocabulary"))
    prompts = [weight for name, weight in trained_by(peft_model).items() if "language_model" in name]
    prompts = torch.cat([prompt for prompt in prompts if prompt.shape[-1] == embeddings.shape[-1]])
    assert len(prompts) == 3 * 3
    assert all((embeddings == prompt).all(dim=-1).any() for prompt in prompts)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("kwargs", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("placement", ["one device", "cpu"])
def test_loading_onto_a_base_that_is_offloaded(saved, tmp_path, placement, kwargs, low_cpu_mem_usage):
    inputs = inputs_for(kwargs)
    expected = adapt(make_llava(), **kwargs)
    expected.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(placement, saved, None), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not any(parameter.is_meta for parameter in trained_by(loaded).values())
    # A product with a thin matrix depends on where in memory that lies, and files are mapped into it.
    torch.testing.assert_close(loaded(**inputs).logits, expected(**inputs).logits, atol=1e-4, rtol=0)


def test_loading_onto_a_base_on_disk(saved, tmp_path):
    inputs = make_inputs()
    expected = adapt(make_llava())
    expected.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"offloaded to disk: .* set_peft_model_state_dict\(model, "):
        PeftModel.from_pretrained(load("disk", saved, tmp_path / "offload"), tmp_path)
    # The way out of the message.
    model = get_peft_model(load("disk", saved, tmp_path / "offload"), PeftConfig.from_pretrained(tmp_path))
    set_peft_model_state_dict(model, load_peft_weights(tmp_path))
    assert torch.equal(model(**inputs).logits, expected(**inputs).logits)
    # Beside a first adapter, PEFT loads them too.
    model.load_adapter(tmp_path, "other")
    model.set_adapter("other")
    assert torch.equal(model(**inputs).logits, expected(**inputs).logits)


@pytest.mark.parametrize("kwargs", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("offload", ["cpu", "disk", "dispatch"])
def test_offloading_a_model_that_is_adapted(tmp_path, offload, kwargs):
    inputs = inputs_for(kwargs)
    peft_model = adapt(make_llava(), **kwargs)
    expected = peft_model(**inputs).logits
    if offload == "cpu":
        cpu_offload(peft_model, execution_device="cpu")
    elif offload == "disk":
        disk_offload(peft_model, tmp_path, execution_device="cpu")
    else:
        device_map = {f"base_model.model.{path}": device for path, device in ON_DISK.items()}
        dispatch_model(peft_model, device_map, main_device="cpu", offload_dir=tmp_path)
    assert any(parameter.is_meta for parameter in trained_by(peft_model).values())
    assert torch.equal(peft_model(**inputs).logits, expected)
    with peft_model.disable_adapter():
        assert torch.equal(peft_model(**make_inputs()).logits, make_llava()(**make_inputs()).logits)


@pytest.mark.parametrize("kwargs", [{}, {"tune_connector": False}, {"connector_rank": 2}], ids=str)
@pytest.mark.parametrize("offload", [cpu_offload, disk_offload])
def test_offloading_a_connector_with_weights_of_its_own(tmp_path, offload, kwargs):
    """Gemma 3 has a matrix beside the modules in its connector."""

    class Projector(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(32, 48))
            self.norm = nn.LayerNorm(32)
            self.linear = nn.Linear(48, 48)

        def forward(self, image_features):
            return self.linear(self.norm(image_features) @ self.matrix)

    torch.manual_seed(0)
    model = make_llava()
    model.model.multi_modal_projector = Projector()
    peft_model = adapt(model, **kwargs)
    expected = peft_model(**make_inputs()).logits
    offload(peft_model, *([tmp_path] if offload is disk_offload else []), execution_device="cpu")
    for _ in range(2):
        assert torch.equal(peft_model(**make_inputs()).logits, expected)
        assert all(parameter.is_meta for parameter in trained_by(peft_model).values())


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kwargs", ADAPTERS.values(), ids=ADAPTERS)
def test_dtypes_of_the_adapter(tmp_path, kwargs, dtype, autocast_adapter_dtype):
    inputs = inputs_for(kwargs)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    options = {"autocast_adapter_dtype": autocast_adapter_dtype}
    peft_model = get_peft_model(make_llava().to(dtype), make_config(**kwargs), **options)
    expected_dtype = torch.float32 if autocast_adapter_dtype else dtype
    assert {parameter.dtype for parameter in trained_by(peft_model).values()} == {expected_dtype}
    peft_model(**inputs).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in trained_by(peft_model).values())
    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llava().to(dtype), tmp_path, **options)
    assert {parameter.dtype for parameter in trained_by(loaded).values()} == {expected_dtype}
    assert torch.equal(loaded(**inputs).logits, peft_model(**inputs).logits)


def test_taking_offloading_back():
    peft_model = adapt(cpu_offload(make_llava(), execution_device="cpu"))
    dispatched = adapt(dispatch_model(make_llava(), {"": "cpu"}, force_hooks=True))
    for model in (peft_model, dispatched):
        expected = model(**make_inputs()).logits
        remove_hook_from_submodules(model.get_base_model())
        assert not any(parameter.is_meta for parameter in model.parameters())
        assert torch.equal(model(**make_inputs()).logits, expected)


def test_a_copy_of_an_offloaded_model(saved, tmp_path):
    peft_model = adapt(load("disk", saved, tmp_path))
    twin = copy.deepcopy(peft_model)
    expected = peft_model(**make_inputs()).logits
    with torch.no_grad():
        for parameter in trained_by(twin).values():
            parameter.mul_(2)
    assert torch.equal(peft_model(**make_inputs()).logits, expected)
    assert not torch.equal(twin(**make_inputs()).logits, expected)


def test_a_base_without_weights():
    with torch.device("meta"):
        model = make_llava()
    peft_model = get_peft_model(model, make_config(init_prompts="vocabulary"))
    assert peft_model.peft_config["default"].num_interaction_tokens == 2
    assert all(parameter.is_meta for parameter in peft_model.parameters())


def test_a_forward_pass_without_weights():
    # As tools run it that estimate memory or count operations.
    with torch.device("meta"):
        peft_model = get_peft_model(make_llava(), make_config())
        logits = peft_model(input_ids=torch.ones(1, 5, dtype=torch.long)).logits
    assert logits.is_meta and logits.shape[:2] == (1, 5)
