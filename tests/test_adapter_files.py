"""Adapters come from strangers: whatever is in their files, the model stays as it was and the error says why."""

import json
import pickle
import resource
import struct

import pytest
import torch
from helpers.models import adapt, make_inputs, make_llava, without_labels
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors.torch import load_file, save_file

from peft_m2pt import M2PTConfig
from peft_m2pt.errors import AdapterFileError


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MORE_MEMORY = 2**30  # bytes

hostile = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    adapt(make_llava()).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    for name in (CONFIG, WEIGHTS):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    return tmp_path


class Base:
    """A model, and what must be the same after a failed load."""

    def __init__(self):
        self.model = make_llava()
        self.inputs = without_labels(make_inputs())
        self.before = self.state()

    @torch.no_grad()
    def state(self):
        # First, since transformers hangs its own hooks on modules when they are called.
        logits = self.model(**self.inputs).logits
        modules = {name: type(module) for name, module in self.model.named_modules()}
        gradients = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
        hooks = {
            name: (len(module._forward_hooks), len(module._forward_pre_hooks))
            for name, module in self.model.named_modules()
        }
        return modules, gradients, hooks, set(vars(self.model)), logits

    def load(self, folder):
        """Loads an adapter, or raises an error and leaves everything as it was."""
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        try:
            loaded = PeftModel.from_pretrained(self.model, folder)
        except Exception:
            *before, logits_before = self.before
            *after, logits = self.state()
            assert after == before
            assert torch.equal(logits, logits_before)
            raise
        finally:
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < memory + MORE_MEMORY
        with torch.no_grad():
            assert loaded(**self.inputs).logits.isfinite().all()
        self.__init__()


@pytest.fixture(scope="module")
def base():
    return Base()


def change_config(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def change_weights(folder, change):
    weights = load_file(folder / WEIGHTS)
    save_file(change(weights), folder / WEIGHTS)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=5,
)
FIELDS = sorted(set(M2PTConfig().to_dict()) - {"peft_type", "auto_mapping"})


@hostile
@given(field=st.sampled_from(FIELDS), value=ANYTHING)
def test_any_value_of_any_field(base, saved, tmp_path, field, value):
    for name in (CONFIG, WEIGHTS):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    change_config(tmp_path, **{field: value})
    try:
        base.load(tmp_path)
    except ValueError as error:
        assert len(str(error)) > 20


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("num_visual_tokens", "20", "num_visual_tokens='20' is not an integer"),
        ("num_visual_tokens", -1, "num_visual_tokens=-1 is negative"),
        ("num_visual_tokens", 10**30, "longer than any sequence"),
        ("num_textual_tokens", 2**20, r"textual prompt of layer 0 .*expected shape \[1048576, 48\]"),
        ("num_textual_tokens", 2.5, "num_textual_tokens=2.5 is not an integer"),
        ("num_interaction_tokens", [], r"num_interaction_tokens=\[\] is not an integer"),
        ("interaction_placement", "../../etc", "interaction_placement='../../etc' is unknown"),
        ("visual_layers", {"a": 1}, "visual_layers={'a': 1} is neither a list"),
        ("visual_layers", [10**9], r"visual_layers=\[1000000000\]: layer 1000000000 .* does not exist"),
        ("init_std", float("nan"), "init_std=nan is not a finite number"),
        (
            "vision_encoder",
            "../../../etc/passwd",
            "vision_encoder='../../../etc/passwd': .* has no module at this path",
        ),
        ("vision_encoder", "__class__.__init__", "has no module at this path"),
        ("text_decoder", "model.language_model.layers.0.self_attn.q_proj", "no layer with self-attention"),
        ("connector", "lm_head.weight", "connector='lm_head.weight'"),
        ("connector", 7, "connector=7 is not a module path"),
        (
            "modules_to_save",
            ["lm_head"],
            r"modules_to_save=\['lm_head'\]: expected 'lm_head.weight' of shape \[97, 48\]",
        ),
        ("modules_to_save", ["model"], r"modules_to_save=\['model'\]: expected 'model"),
        ("modules_to_save", [""], r"modules_to_save=\[''\] is not a list of module names"),
        ("exclude_modules", "(a+)+$", "is a regular expression, and one from an untrusted source can hang"),
        ("exclude_modules", [["a"]], "is not a list of module names"),
        ("connector_rank", 10**9, "connector_rank=1000000000"),
        ("connector_rank", True, "connector_rank=True is not an integer above 0"),
    ],
)
def test_config(base, folder, field, value, message):
    change_config(folder, **{field: value})
    with pytest.raises(ValueError, match=f"(?s){message}"):
        base.load(folder)


@pytest.mark.parametrize("rank", [None, 4])
def test_a_config_of_before_there_was_a_default_rank(tmp_path, rank):
    """Without the field, the connector is a full copy."""
    peft_model = adapt(make_llava(), connector_rank=rank)
    peft_model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    loaded = PeftModel.from_pretrained(make_llava(), tmp_path)
    assert loaded.peft_config["default"].connector_rank == rank
    assert torch.equal(loaded(**make_inputs()).logits, peft_model(**make_inputs()).logits)


def test_the_config_of_another_method(tmp_path):
    LoraConfig(target_modules=["q_proj"]).save_pretrained(tmp_path)
    message = "It has peft_type='LORA', so this is not an M2PT adapter. Use PeftConfig for adapters of other methods."
    with pytest.raises(AdapterFileError, match=message):
        M2PTConfig.from_pretrained(tmp_path)
    assert isinstance(PeftConfig.from_pretrained(tmp_path), LoraConfig)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{", b"\xff\xfe", b'{"peft_type": "M2PT"', b"[" * 100_000])
def test_config_that_is_none(base, folder, content):
    (folder / CONFIG).write_bytes(content)
    with pytest.raises(AdapterFileError, match=f"'{CONFIG}' of the adapter '{folder}' is wrong or damaged"):
        M2PTConfig.from_pretrained(folder)
    # PEFT reads the file first, to see which method it is of.
    with pytest.raises(Exception):
        base.load(folder)


def test_keys_that_come_twice(base, folder):
    text = (folder / CONFIG).read_text().strip()
    (folder / CONFIG).write_text(text[:-1] + ', "num_visual_tokens": 9}')
    # The last one counts, and does not fit the weights.
    with pytest.raises(
        ValueError, match=r"visual prompt of layer 0 .*expected shape \[9, 32\], found shape \[4, 32\]"
    ):
        base.load(folder)


@hostile
@given(data=st.data())
def test_bits_that_flip(base, saved, tmp_path, data):
    for name in (CONFIG, WEIGHTS):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    content = bytearray((saved / WEIGHTS).read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0]
    for position in data.draw(st.lists(st.integers(0, header - 1), min_size=1, max_size=4)):
        content[position] ^= 1 << data.draw(st.integers(0, 7))
    (tmp_path / WEIGHTS).write_bytes(content)
    try:
        base.load(tmp_path)
    except ValueError as error:
        assert len(str(error)) > 20


@hostile
@given(share=st.floats(0, 0.999))
def test_files_that_end_early(base, saved, tmp_path, share):
    for name in (CONFIG, WEIGHTS):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    content = (saved / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content[: int(share * len(content))])
    with pytest.raises(AdapterFileError, match=f"'{WEIGHTS}' of the adapter '{tmp_path}' is wrong or damaged"):
        base.load(tmp_path)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["vision_tower", "language_model", "m2pt_connector", "m2pt_interaction"])
def test_numbers_that_are_none(base, folder, part, number):
    def change(weights):
        name = next(name for name in weights if part in name)
        weights[name].view(-1)[0] = number
        return weights

    change_weights(folder, change)
    with pytest.raises(ValueError, match="found numbers that are not finite"):
        base.load(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda weights: {}, "expected shape .* found nothing"),
        (lambda weights: {**weights, "more": torch.zeros(3)}, r"'more': expected nothing, found shape \[3\]"),
        (lambda weights: {name: weight[:1] for name, weight in weights.items()}, r"expected shape \[4, 32\], found"),
        (lambda weights: {name: weight.int() for name, weight in weights.items()}, "torch.int32"),
        (lambda weights: {f"../{name}": weight for name, weight in weights.items()}, "found nothing"),
    ],
)
def test_other_weights(base, folder, change, message):
    change_weights(folder, change)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        base.load(folder)


def test_a_shape_bomb(base, folder):
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 4]}}).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    with pytest.raises(AdapterFileError, match="is wrong or damaged"):
        base.load(folder)


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("code of the file was run",))


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_model.bin"])
def test_pickles(base, folder, name):
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(AdapterFileError, match="is wrong or damaged"):
        base.load(folder)


def test_no_weights(base, folder):
    (folder / WEIGHTS).unlink()
    with pytest.raises((ValueError, OSError)):
        base.load(folder)


def test_a_failure_half_way(base, monkeypatch, folder):
    from peft_m2pt.layers.attention import M2PTAttention

    update_layer, calls = M2PTAttention.update_layer, []

    def failing(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 4:
            raise RuntimeError("half way")
        update_layer(self, *args, **kwargs)

    monkeypatch.setattr(M2PTAttention, "update_layer", failing)
    with pytest.raises(RuntimeError, match="half way"):
        base.load(folder)
    monkeypatch.undo()
    base.load(folder)


def test_another_adapter_stays_as_it_is(folder):
    peft_model = adapt(make_llava(), adapter_name="mine")
    inputs = without_labels(make_inputs())
    before, names = peft_model(**inputs).logits, set(peft_model.state_dict())
    change_weights(folder, lambda weights: {name: weight[:1] for name, weight in weights.items()})
    with pytest.raises(ValueError, match="do not fit the model"):
        peft_model.load_adapter(folder, adapter_name="theirs")
    assert set(peft_model.state_dict()) == names and list(peft_model.peft_config) == ["mine"]
    assert torch.equal(peft_model(**inputs).logits, before)
