"""Converting official checkpoints: reference weights go to disk as the official code saves them, and come back."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.official_checkpoints import (
    NUM_TOKENS,
    VISION,
    Folders,
    is_vision,
    official_weights,
    write_json,
    write_tokenizer,
    write_weights,
)
from helpers.reference import IMAGE_FEATURES, LOGITS, LOSS, load_case
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from peft_m2pt import M2PTConfig, adapt_processor
from peft_m2pt.convert import convert_checkpoint
from peft_m2pt.convert import converter as convert
from peft_m2pt.errors import ConversionError
from peft_m2pt.tools.cli import main


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


def test_command_as_a_module(folders, fresh):
    (folders.original / "pytorch_model.bin").write_bytes(b"")
    result = fresh.command(*arguments(folders))
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


def test_importing_the_package_does_not_import_this(fresh):
    code = "import sys, peft_m2pt; assert 'peft_m2pt.convert' not in sys.modules; import peft_m2pt.convert"
    result = fresh.code(code)
    assert result.returncode == 0, result.stderr
