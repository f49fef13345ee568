"""Converting official checkpoints: reference weights go to disk as the official code saves them, and come back."""

import json
import os
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from peft import PeftModel
from reference import IMAGE_FEATURES, LOGITS, LOSS, load_case
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoProcessor, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from peft_m2pt import M2PTConfig, adapt_processor, convert
from peft_m2pt.cli import main
from peft_m2pt.convert import convert_checkpoint
from peft_m2pt.errors import ConversionError


VISION = "model.vision_tower.vision_tower.vision_model."
INDEX = "pytorch_model.bin.index.json"
NUM_TOKENS = 160


def official_weights(case):
    return {name.removeprefix("weights."): case[name] for name in case.tensors if name.startswith("weights.")}


def is_trained(name):
    return "prompts" in name or "mm_projector" in name or name == "lm_head.weight"


def is_vision(name):
    return name.startswith(VISION) and not is_trained(name)


def is_text(name):
    return not is_vision(name) and "prompts" not in name and "mm_projector" not in name


def write_json(path, content):
    path.write_text(json.dumps(content))


def write_weights(folder, weights, layout, num_shards=3):
    """Layouts: "bin", "sharded bin", "safetensors", "sharded safetensors"."""
    suffix = layout.split()[-1]
    name, write = ("model", save_file) if suffix == "safetensors" else ("pytorch_model", torch.save)
    if not layout.startswith("sharded"):
        write(weights, folder / f"{name}.{suffix}")
        return
    weight_map = {}
    for i in range(num_shards):
        shard = dict(list(weights.items())[i::num_shards])
        file = f"{name}-{i + 1:05d}-of-{num_shards:05d}.{suffix}"
        write(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    write_json(folder / f"{name}.{suffix}.index.json", {"metadata": {}, "weight_map": weight_map})


def write_tokenizer(folder, num_tokens=NUM_TOKENS, **ids):
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, num_tokens)}
    words = {token_id: token for token, token_id in (vocabulary | ids).items()}
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in words.items()}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


class Folders:
    """An official checkpoint of a reference case, the two models that it was trained on, and where the output goes."""

    def __init__(self, root, case, layout="bin", complete=True):
        self.root = root
        self.original, self.language_model, self.vision_tower = root / "original", root / "llama", root / "clip"
        self.output = root / "output"
        for folder in (self.original, self.language_model, self.vision_tower):
            folder.mkdir()
        self.weights = official_weights(case)
        llama = case.facts["llama"]
        write_json(
            self.original / "config.json",
            {**llama, "model_type": "llava_finetune", "mm_vision_select_layer": case.facts["mm_vision_select_layer"]},
        )
        write_json(self.language_model / "config.json", {**llama, "model_type": "llama"})
        vision = {**case.facts["clip_vision"], "model_type": "clip_vision_model"}
        write_json(self.vision_tower / "config.json", {"model_type": "clip", "vision_config": vision})
        write_tokenizer(self.language_model)

        text = {name: weight for name, weight in self.weights.items() if is_text(name)}
        # CLIP models have a text encoder too.
        clip = {name.removeprefix(VISION): weight for name, weight in self.weights.items() if is_vision(name)}
        clip = {f"vision_model.{name}": weight for name, weight in clip.items()}
        clip |= {"text_model.embeddings.token_embedding.weight": torch.ones(2, 2), "logit_scale": torch.ones(())}
        if complete:
            # What the official checkpoint holds must win over these.
            text, clip = ({name: torch.ones_like(weight) for name, weight in part.items()} for part in (text, clip))
        else:
            self.weights = {name: weight for name, weight in self.weights.items() if is_trained(name)}
            text["lm_head.weight"] = torch.ones_like(text["lm_head.weight"])
        write_weights(self.original, self.weights, layout)
        write_weights(self.language_model, text, layout)
        write_weights(self.vision_tower, clip, layout)

    def convert(self, **kwargs):
        folders = (self.original, self.language_model, self.vision_tower, self.output)
        return convert_checkpoint(*folders, progressbar=False, **kwargs)

    def write(self, weights):
        write_weights(self.original, weights, "bin")

    def set(self, folder, **changes):
        path = folder / "config.json"
        write_json(path, {**json.loads(path.read_text()), **changes})

    def refuse(self, *parts, **kwargs):
        before = set(self.root.rglob("*"))
        with pytest.raises(ConversionError) as error:
            self.convert(**kwargs)
        for part in parts:
            assert part in str(error.value)
        assert set(self.root.rglob("*")) == before


@pytest.fixture
def folders(tmp_path):
    return Folders(tmp_path, load_case("v4_t3"))


def load(folders):
    base, info = LlavaForConditionalGeneration.from_pretrained(folders.output / "base", output_loading_info=True)
    assert not any(info.values()), info
    return PeftModel.from_pretrained(base, folders.output / "adapter").eval()


def with_image_token(inputs, case, model):
    ids = inputs["input_ids"]
    return {**inputs, "input_ids": ids.masked_fill(ids == case.image_token, model.config.image_token_id)}


@torch.no_grad()
def check_exact(folders, case):
    """Compares what was converted with the numbers of the official code."""
    model = load(folders)
    inputs = with_image_token(case.inputs, case, model)
    features = torch.stack(list(model.get_base_model().get_image_features(inputs["pixel_values"]).pooler_output))
    torch.testing.assert_close(features, case["image_features"], atol=IMAGE_FEATURES, rtol=0)

    real = inputs["attention_mask"].bool()
    logits = model(**inputs).logits[..., :NUM_TOKENS]
    expected = case["logits"][:, case.facts["n_text_prompts"] :]
    torch.testing.assert_close(logits[real], expected[real], atol=LOGITS, rtol=0)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), inputs["labels"][:, 1:])
    torch.testing.assert_close(loss[None], case["loss"], atol=LOSS, rtol=0)

    inputs = with_image_token(case.greedy_inputs, case, model)
    for suppress_tokens in (model.generation_config.suppress_tokens, None):
        model.generation_config.suppress_tokens = suppress_tokens
        output = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=8,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        assert output.sequences[0, inputs["input_ids"].shape[1] :].tolist() == case["greedy.tokens"].tolist()
        logits = torch.cat(output.logits)[:, :NUM_TOKENS]
        torch.testing.assert_close(logits, case["greedy.logits"], atol=LOGITS, rtol=0)
    return model


@pytest.mark.parametrize("complete", [True, False], ids=["complete", "trained"])
@pytest.mark.parametrize("layout", ["bin", "sharded bin", "safetensors", "sharded safetensors"])
@pytest.mark.parametrize("name", ["v10_t10", "v4_t3", "v0_t10"])
def test_round_trip(tmp_path, name, layout, complete):
    case = load_case(name)
    folders = Folders(tmp_path, case, layout, complete)
    config = folders.convert(max_shard_size="200KB")
    num_visual, num_textual = case.facts["n_visual_prompts"], case.facts["n_text_prompts"]
    assert (config.num_visual_tokens, config.num_textual_tokens) == (num_visual, num_textual)
    check_exact(folders, case)


def test_half_precision_stays_as_it_is(folders):
    folders.write({name: weight.bfloat16() for name, weight in folders.weights.items()})
    folders.convert()
    model = LlavaForConditionalGeneration.from_pretrained(folders.output / "base")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for file in folders.output.rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
    for i in range(3):
        stored = load_file(folders.output / "adapter" / "adapter_model.safetensors")
        name = f"base_model.model.model.language_model.layers.{i}.self_attn.m2pt_prompt.weight"
        assert torch.equal(stored[name], folders.weights[f"model.prompts.{i}"][0].bfloat16())


def test_files_before_torch_1_6(folders):
    torch.save(
        folders.weights,
        folders.original / "pytorch_model.bin",
        _use_new_zipfile_serialization=False,
        pickle_protocol=2,
    )
    folders.convert()
    check_exact(folders, load_case("v4_t3"))


def test_tied_embeddings(folders):
    folders.set(folders.language_model, tie_word_embeddings=True)
    embeddings = folders.weights["model.embed_tokens.weight"]
    folders.write({**folders.weights, "lm_head.weight": embeddings})
    write_tokenizer(folders.language_model, **{"<image>": 7})
    folders.convert()
    base = load(folders).get_base_model()
    assert torch.equal(base.lm_head.weight, embeddings)
    assert torch.equal(base.get_input_embeddings().weight, embeddings)


def test_a_clip_without_text_encoder(tmp_path):
    case = load_case("v4_t3")
    folders = Folders(tmp_path, case, complete=False)
    weights = {name.removeprefix(VISION): weight for name, weight in official_weights(case).items() if is_vision(name)}
    write_weights(folders.vision_tower, weights, "bin")
    write_json(folders.vision_tower / "config.json", {**case.facts["clip_vision"], "model_type": "clip_vision_model"})
    folders.convert()
    check_exact(folders, case)


def test_one_visual_prompt_gives_no_interaction_prompt(folders):
    folders.write({n: w[:, :1] if "encoder.prompts" in n else w for n, w in folders.weights.items()})
    assert folders.convert().num_interaction_tokens == 0
    model = load(folders)
    assert not any("m2pt_interaction" in name for name, _ in model.named_parameters())
    # The official code drops the only prompt where it would drop the class token.
    assert model.config.vision_feature_select_strategy == "full"


def test_adapter(folders):
    folders.convert()
    config = M2PTConfig.from_pretrained(folders.output / "adapter")
    assert config.base_model_name_or_path == str(folders.output / "base")
    assert (config.num_interaction_tokens, config.interaction_placement, config.tune_connector) == (3, "image", True)
    model = load(folders)
    # The base has the trained projector too, so it is a LLaVA of its own.
    base = {name: p for name, p in model.named_parameters() if "projector.linear" in name}
    assert torch.equal(
        base.pop(next(n for n in base if "linear_1.weight" in n)), folders.weights["model.mm_projector.weight"]
    )


def test_files_are_split(folders):
    folders.convert(max_shard_size="100KB")
    base = folders.output / "base"
    index = json.loads((base / "model.safetensors.index.json").read_text())
    files = sorted(base.glob("*.safetensors"))
    assert len(files) > 5
    assert set(index["weight_map"].values()) == {file.name for file in files}
    for file in files:
        with safe_open(file, "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            assert all(index["weight_map"][name] == file.name for name in shard.keys())
        assert file.stat().st_size < 110_000
    assert index["metadata"]["total_size"] == sum(t.nbytes for file in files for t in load_file(file).values())


# The image token


def test_a_new_image_token_never_wins(folders):
    folders.convert()
    base = LlavaForConditionalGeneration.from_pretrained(folders.output / "base")
    assert base.config.image_token_id == NUM_TOKENS
    assert base.config.text_config.vocab_size == len(base.lm_head.weight) == NUM_TOKENS + 1
    assert torch.equal(base.lm_head.weight[NUM_TOKENS], folders.weights["lm_head.weight"][0])
    assert not base.get_input_embeddings().weight[NUM_TOKENS].any()
    assert base.generation_config.suppress_tokens == [NUM_TOKENS]
    # Even if the token whose row it shares wins, the image token does not.
    hidden_states = torch.randn(1000, base.lm_head.in_features) + 10 * base.lm_head.weight[0]
    chosen = base.lm_head(hidden_states).argmax(-1)
    assert (chosen == 0).sum() > 500 and not (chosen == NUM_TOKENS).any()


@pytest.mark.parametrize("name", ["v4_t3", "v0_t10"])
def test_an_unused_row_becomes_the_image_token(tmp_path, name):
    case = load_case(name)
    folders = Folders(tmp_path, case)
    write_tokenizer(folders.language_model, num_tokens=case.image_token)
    folders.convert()
    assert load(folders).generation_config.suppress_tokens is None
    model = check_exact(folders, case)
    assert model.config.image_token_id == case.image_token
    assert model.config.text_config.vocab_size == NUM_TOKENS
    # Without a new token, the loss is exact too.
    torch.testing.assert_close(model(**case.inputs).loss[None], case["loss"], atol=LOSS, rtol=0)


def test_an_image_token_of_the_tokenizer_is_used(folders):
    write_tokenizer(folders.language_model, **{"<image>": 7})
    folders.convert()
    base = LlavaForConditionalGeneration.from_pretrained(folders.output / "base")
    assert base.config.image_token_id == 7
    assert len(base.lm_head.weight) == NUM_TOKENS


# The processor


@pytest.mark.parametrize("name", ["v4_t3", "v0_t10"])
def test_processor(tmp_path, name):
    case = load_case(name)
    folders = Folders(tmp_path, case)
    folders.convert()
    model = load(folders)
    processor = AutoProcessor.from_pretrained(folders.output / "base")
    image = np.zeros((40, 30, 3), dtype=np.uint8)
    inputs = processor(text="w5 <image> w6", images=image, return_tensors="pt")
    num_rows = case.facts["num_image_rows"]
    assert inputs["input_ids"].tolist() == [[5] + [model.config.image_token_id] * num_rows + [6]]
    assert inputs["pixel_values"].shape == (1, 3, 28, 28)
    assert model(**inputs).logits.shape[1] == num_rows + 2
    assert processor.tokenizer.pad_token == "<unk>"
    # It is adapted already, so doing it again changes nothing.
    adapt_processor(processor, model.peft_config["default"])
    again = processor(text="w5 <image> w6", images=image, return_tensors="pt")
    assert torch.equal(again["input_ids"], inputs["input_ids"])
    assert processor.tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True) == "w5 w6"


def test_preprocessor_config_of_the_vision_tower_is_used(folders):
    size = {"size": {"height": 28, "width": 28}, "crop_size": {"height": 28, "width": 28}}
    write_json(
        folders.vision_tower / "preprocessor_config.json",
        {"image_processor_type": "CLIPImageProcessor", "image_mean": [0.1, 0.2, 0.3], **size},
    )
    folders.convert()
    image_processor = AutoProcessor.from_pretrained(folders.output / "base").image_processor
    assert list(image_processor.image_mean) == [0.1, 0.2, 0.3]


def test_conversations_are_those_of_the_official_training(folders):
    folders.convert()
    processor = AutoProcessor.from_pretrained(folders.output / "base")
    image_and_text = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    messages = [
        {"role": "user", "content": image_and_text},
        {"role": "assistant", "content": [{"type": "text", "text": "A duck."}]},
        {"role": "user", "content": "Sure?"},
    ]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\nWhat is this? ASSISTANT: A duck.</s>"
        "USER: Sure? ASSISTANT:"
    )
    messages = [{"role": "system", "content": "Be brief."}, messages[2], messages[1]]
    assert processor.apply_chat_template(messages) == "Be brief. USER: Sure? ASSISTANT: A duck.</s>"


def test_the_chat_template_of_the_tokenizer_is_kept(folders):
    (folders.language_model / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    folders.convert()
    processor = AutoProcessor.from_pretrained(folders.output / "base")
    assert processor.apply_chat_template([{"role": "user", "content": "w3"}]) == "w3"


# Memory

# Not `ru_maxrss`, which begins with the memory of the process that starts this one.
MEASURE = """\
import re
import sys
from pathlib import Path

from peft_m2pt.convert import convert_checkpoint

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])

def convert(root):
    root = Path(root)
    convert_checkpoint(root / "original", root / "llama", root / "clip", root / "output", int(sys.argv[3]), False)

convert(sys.argv[1])  # imports
before = peak()
convert(sys.argv[2])
print(peak() - before)
"""


def write_large(folders, layout, num_shards):
    """Makes the language model large: about 24 MB for each of its layers, one layer in each shard."""
    width, inner = 768, 1792
    shapes = dict.fromkeys([f"self_attn.{name}_proj.weight" for name in "qkvo"], (width, width))
    shapes |= dict.fromkeys(["mlp.gate_proj.weight", "mlp.up_proj.weight"], (inner, width))
    shapes |= {"mlp.down_proj.weight": (width, inner)}
    shapes |= dict.fromkeys(["input_layernorm.weight", "post_attention_layernorm.weight"], (width,))
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": num_shards}
    for file in folders.language_model.glob("*model*"):
        file.unlink()
    folders.set(folders.language_model, **sizes)
    weight_map = {}
    name, write = ("model", save_file) if layout == "safetensors" else ("pytorch_model", torch.save)
    for i in range(num_shards):
        shard = {f"model.layers.{i}.{part}": torch.rand(shape) for part, shape in shapes.items()}
        if i == 0:
            outer = ("model.embed_tokens.weight", "lm_head.weight")
            shard |= {part: torch.rand(NUM_TOKENS, width) for part in outer} | {"model.norm.weight": torch.rand(width)}
        write(shard, folders.language_model / f"{name}-{i}.{layout}")
        weight_map |= dict.fromkeys(shard, f"{name}-{i}.{layout}")
    write_json(folders.language_model / f"{name}.{layout}.index.json", {"weight_map": weight_map})
    trained = {f"model.prompts.{i}": torch.rand(1, 3, width) for i in range(num_shards)}
    trained |= {"model.mm_projector.weight": torch.rand(width, 48), "model.mm_projector.bias": torch.rand(width)}
    trained |= {part: weight for part, weight in folders.weights.items() if part.startswith(VISION)}
    folders.write(trained)
    return sum(file.stat().st_size for file in folders.language_model.glob(f"*.{layout}"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("layout", ["bin", "safetensors"])
def test_memory_stays_near_one_shard(tmp_path, layout):
    num_shards = 8
    (tmp_path / "small").mkdir()
    (tmp_path / "large").mkdir()
    small, large = (Folders(tmp_path / size, load_case("v4_t3")) for size in ("small", "large"))
    total = write_large(large, layout, num_shards)
    shard = total / num_shards
    command = [sys.executable, "-c", MEASURE, small.root, large.root, str(int(shard))]
    growth = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert (large.output / "base" / "model.safetensors.index.json").exists()
    print(f"{layout}: total {total / 1e6:.0f} MB, shard {shard / 1e6:.0f} MB, memory grew by {growth / 1e6:.0f} MB")
    assert growth < 3 * shard < total / 2


# What is refused


class Malicious:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_malicious_files_are_refused(folders):
    trap = folders.root.parent / f"{folders.root.name}-trap"
    file = folders.original / "pytorch_model.bin"
    torch.save({**folders.weights, "model.norm.weight": Malicious(trap)}, file)
    asked_for = f"{os.mkdir.__module__}.mkdir"
    refused = (
        f"{file} is refused: it asks for '{asked_for}' where only tensors are expected. Nothing in it was executed."
    )
    folders.refuse(refused)
    file.write_bytes(pickle.dumps(Malicious(trap), protocol=2))
    folders.refuse(refused)
    assert not trap.exists()
    pickle.loads(file.read_bytes())
    assert trap.exists(), "this file would not have done any harm"


@pytest.mark.parametrize(
    "content", [[torch.ones(1)], {"a": 1}, {1: torch.ones(1)}, {"a": torch.ones(2, 2).to_sparse()}]
)
def test_other_things_than_tensors_are_refused(folders, content):
    torch.save(content, folders.original / "pytorch_model.bin")
    folders.refuse(f"{folders.original / 'pytorch_model.bin'} is refused: it holds something else than named tensors.")


@pytest.mark.parametrize("layout", ["bin", "safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_truncated_files_are_refused(tmp_path, layout, kept):
    folders = Folders(tmp_path, load_case("v4_t3"), layout)
    (file,) = folders.language_model.glob("*model*." + layout)
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content))])
    folders.refuse(str(file))


def test_a_missing_shard_is_refused(tmp_path):
    folders = Folders(tmp_path, load_case("v4_t3"), "sharded bin")
    (folders.original / "pytorch_model-00002-of-00003.bin").unlink()
    folders.refuse(
        f"{folders.original / INDEX} names the shard 'pytorch_model-00002-of-00003.bin', which does not exist"
    )


@pytest.mark.parametrize("where", ["../llama/pytorch_model.bin", "{root}/llama/pytorch_model.bin", "", "..", 3, None])
def test_an_index_that_points_elsewhere_is_refused(folders, where):
    where = where.format(root=folders.root) if isinstance(where, str) else where
    (folders.original / "pytorch_model.bin").unlink()
    write_json(folders.original / INDEX, {"weight_map": {"lm_head.weight": where}})
    folders.refuse(str(folders.original / INDEX), repr(where))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', "\xff"])
def test_a_broken_index_is_refused(folders, content):
    (folders.original / "pytorch_model.bin").unlink()
    (folders.original / INDEX).write_text(content, encoding="latin-1")
    folders.refuse(str(folders.original / INDEX))


def test_contradictory_shards_are_refused(tmp_path):
    folders = Folders(tmp_path, load_case("v4_t3"), "sharded bin")
    first, second = (folders.original / f"pytorch_model-0000{i}-of-00003.bin" for i in (1, 2))
    shard = torch.load(second)
    name = next(iter(shard))
    torch.save({**torch.load(first), name: shard[name]}, first)
    folders.refuse(f"'{name}' is in both {first} and {second}.")
    del shard[name]
    torch.save(shard, second)
    folders.refuse(f"{second} lacks '{name}', which is in it according to the index.")


def test_folders_without_weights_are_refused(folders):
    (folders.original / "pytorch_model.bin").unlink()
    folders.refuse(f"{folders.original} has no weights. Expected one of the files model.safetensors, ")


@pytest.mark.parametrize(
    ("name", "prompts"),
    [("model.prompts.2", "textual"), (VISION + "encoder.prompts.3", "visual"), ("model.prompts.0", "textual")],
)
def test_missing_prompts_are_refused(folders, name, prompts):
    shape = list(folders.weights[name].shape)
    folders.write({n: weight for n, weight in folders.weights.items() if n != name})
    folders.refuse(f"'{name}' in {folders.original}: expected shape {shape}, found nothing")


def test_a_checkpoint_without_prompts_is_refused(folders):
    folders.write({name: weight for name, weight in folders.weights.items() if "prompts" not in name})
    folders.refuse(f"{folders.original} has no prompts", "'model.prompts.0'", f"'{VISION}encoder.prompts.0'")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.prompts.1", [1, 4, 64]),
        ("model.prompts.0", [3, 64]),
        (VISION + "encoder.prompts.3", [1, 4, 64]),
        ("model.mm_projector.weight", [64, 47]),
        ("model.embed_tokens.weight", [161, 64]),
        ("lm_head.weight", [159, 64]),
    ],
)
def test_other_shapes_are_refused(folders, name, shape):
    folders.write({**folders.weights, name: torch.ones(shape)})
    folders.refuse(f"'{name}' in {folders.original}: expected shape ", "found shape ", str(shape))


def test_missing_weights_are_refused(tmp_path):
    folders = Folders(tmp_path, load_case("v4_t3"), complete=False)
    text = torch.load(folders.language_model / "pytorch_model.bin")
    del text["model.norm.weight"]
    write_weights(folders.language_model, text, "bin")
    name = "'model.norm.weight'"
    folders.refuse(
        f"{name} in {folders.original} or {name} in {folders.language_model}: expected shape [64], found nothing"
    )
    write_weights(folders.vision_tower, {}, "bin")
    folders.refuse("'vision_model.embeddings.class_embedding' in ", "expected shape [48], found nothing", "\n- and ")


@pytest.mark.parametrize(
    "name", ["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "model.prompts.4", "lm_head.bias"]
)
def test_unknown_tensors_are_refused(folders, name):
    folders.write({**folders.weights, name: torch.ones(1, 3, 64)})
    folders.refuse(f"'{name}' in {folders.original}: expected nothing")


def test_quantized_weights_are_refused(folders):
    name = "model.layers.0.mlp.up_proj.weight"
    folders.write({**folders.weights, name: folders.weights[name].to(torch.int8)})
    folders.refuse(f"'{name}' in {folders.original}: expected floating point numbers, found torch.int8")


def test_deeper_projectors_are_refused(folders):
    weights = {name.replace("mm_projector.", "mm_projector.0."): weight for name, weight in folders.weights.items()}
    folders.write(weights)
    folders.refuse("'model.mm_projector.weight' in ", "found nothing", "'model.mm_projector.0.weight' in ")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("mm_vision_select_feature", "cls_patch"),
        ("mm_use_im_start_end", True),
        ("mm_use_im_patch_token", True),
        ("image_aspect_ratio", "pad"),
    ],
)
def test_settings_without_reference_are_refused(folders, setting, value):
    folders.set(folders.original, **{setting: value})
    folders.refuse(f"{folders.original / 'config.json'} has {setting}={value!r}")


@pytest.mark.parametrize("layer", [-1, 0, 4, -5])
def test_feature_layers_without_raw_prompts_are_refused(folders, layer):
    folders.set(folders.original, mm_vision_select_layer=layer)
    folders.refuse(f"mm_vision_select_layer={layer} cannot be converted together with visual prompts")


def test_configs_of_something_else_are_refused(folders):
    folders.set(folders.original, mm_vision_select_layer=7)
    folders.refuse("mm_vision_select_layer=7", "has 4 layers")
    folders.set(folders.original, mm_vision_select_layer=None)
    folders.refuse(f"{folders.original / 'config.json'} has no mm_vision_select_layer")
    folders.set(folders.original, mm_vision_select_layer=-2)
    folders.set(folders.vision_tower, model_type="siglip")
    folders.refuse(f"{folders.vision_tower / 'config.json'} has model_type='siglip', expected 'clip'")
    folders.set(folders.language_model, model_type="qwen2")
    folders.refuse(f"{folders.language_model / 'config.json'} has model_type='qwen2', expected 'llama'")
    folders.set(folders.language_model, model_type="llama", hidden_size="wide")
    folders.refuse(f"{folders.language_model / 'config.json'} is no valid LlamaConfig")
    (folders.language_model / "config.json").write_text("{")
    folders.refuse(f"{folders.language_model / 'config.json'} cannot be read")
    (folders.original / "config.json").unlink()
    folders.refuse(f"{folders.original / 'config.json'} cannot be read")


def test_configs_that_do_not_make_a_model_are_refused(folders):
    folders.set(folders.language_model, hidden_act="none")
    folders.refuse("The configs do not make a LLaVA")


def test_a_missing_tokenizer_is_refused(folders):
    for file in folders.language_model.glob("tokenizer*"):
        file.unlink()
    folders.refuse(f"No tokenizer could be loaded from {folders.language_model}")


def test_a_broken_image_processor_is_refused(folders):
    (folders.vision_tower / "preprocessor_config.json").write_text("{")
    folders.refuse(f"No image processor could be loaded from {folders.vision_tower}")


@pytest.mark.parametrize("size", ["large", "5 apples", ""])
def test_nonsense_sizes_are_refused(folders, size):
    folders.refuse(f"max_shard_size={size!r} is not a size", max_shard_size=size)


def test_output_is_not_overwritten(folders):
    folders.output.mkdir()
    (folders.output / "precious").touch()
    folders.refuse(f"{folders.output} exists and is not empty. Choose another output folder.")
    (folders.output / "precious").unlink()
    folders.convert()
    folders.refuse(f"{folders.output} exists and is not empty.")


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt(), ConversionError("no")])
@pytest.mark.parametrize("exists", [True, False])
def test_nothing_is_left_of_a_conversion_that_fails(folders, monkeypatch, error, exists):
    if exists:
        folders.output.mkdir()
    before = set(folders.root.rglob("*"))
    calls = []

    def save_file_until_the_third(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            # If the process is killed here, this is what is left.
            (folder,) = set(folders.root.iterdir()) - before
            assert folder.name.startswith("output.incomplete-") and any(folder.rglob("*.safetensors"))
            raise error
        save_file(*args, **kwargs)

    monkeypatch.setattr(convert, "save_file", save_file_until_the_third)
    with pytest.raises(type(error)):
        folders.convert(max_shard_size="100KB")
    assert len(calls) == 3
    assert set(folders.root.rglob("*")) == before


# The command


def arguments(folders):
    options = ("--language-model", folders.language_model, "--vision-tower", folders.vision_tower)
    return [*map(str, ("convert", folders.original, *options, "--output", folders.output))]


def test_command(folders, capsys):
    assert main([*arguments(folders), "--max-shard-size", "100KB"]) == 0
    output = capsys.readouterr()
    assert output.out == (
        f"{folders.output} is complete: 4 visual and 3 textual prompts per layer, 3 interaction prompts.\n"
    )
    assert (folders.output / "base" / "model.safetensors.index.json").exists()
    assert main(arguments(folders)) == 1
    error = ConversionError(f"{folders.output} exists and is not empty. Choose another output folder.")
    assert capsys.readouterr().err == f"error: {error}\n"


def test_command_as_a_module(folders):
    (folders.original / "pytorch_model.bin").write_bytes(b"")
    command = [sys.executable, "-m", "peft_m2pt", *arguments(folders)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert re.search("^error: .*pytorch_model.bin cannot be read", result.stderr, re.MULTILINE)
    assert "Traceback" not in result.stderr


def test_command_says_what_is_wrong_with_its_arguments(capsys):
    with pytest.raises(SystemExit) as error:
        main(["convert", "somewhere"])
    assert error.value.code == 2
    assert "--language-model, --vision-tower, --output" in capsys.readouterr().err
    with pytest.raises(SystemExit) as error:
        main(["convert", "--help"])
    assert error.value.code == 0
    assert "ORIGINAL" in capsys.readouterr().out


def test_command_that_is_interrupted_or_has_no_space(folders, monkeypatch, capsys):
    for error, code, message in (
        (KeyboardInterrupt(), 130, ""),
        (OSError("No space left on device"), 1, "error: No space left on device\n"),
    ):

        def fail(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(convert, "save_file", fail)
        assert main(arguments(folders)) == code
        assert capsys.readouterr().err == message


def test_a_progress_bar_counts_bytes(folders, capsys):
    convert_checkpoint(folders.original, folders.language_model, folders.vision_tower, folders.output, "100KB")
    assert "100%" in capsys.readouterr().err


def test_importing_the_package_does_not_import_this():
    code = "import sys, peft_m2pt; assert 'peft_m2pt.convert' not in sys.modules; import peft_m2pt.convert"
    subprocess.run([sys.executable, "-c", code], check=True)
