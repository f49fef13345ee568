"""Bundles in the real vLLM, in a build for CPUs, for which `make test-vllm` makes an environment of its own."""

import base64
import contextlib
import gc
import importlib
import io
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial


# Read when vLLM is imported.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CACHE_ROOT": tempfile.mkdtemp(prefix="vllm-"),
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}

import openai  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import transformers as tr  # noqa: E402
import vllm  # noqa: E402
from helpers.models import adapt, randomise  # noqa: E402
from helpers.servers import wait_for  # noqa: E402
from helpers.shapes import IMAGE_SIZE, make_processor  # noqa: E402
from peft import PeftModel  # noqa: E402
from PIL import Image  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.exceptions import VLLMValidationError  # noqa: E402
from vllm.utils.hashing import sha256  # noqa: E402
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash  # noqa: E402
from vllm.v1.engine import EngineCoreRequest  # noqa: E402
from vllm.v1.engine.core import EngineCore  # noqa: E402
from vllm.v1.request import Request  # noqa: E402

import peft_m2pt  # noqa: E402
from peft_m2pt import UnsupportedModelError  # noqa: E402
from peft_m2pt.integrations.vllm import register  # noqa: E402
from peft_m2pt.integrations.vllm.checks import PRIVATE, check_version  # noqa: E402
from peft_m2pt.integrations.vllm.requests import lengthened  # noqa: E402
from peft_m2pt.integrations.vllm.settings import Settings  # noqa: E402


TOLERANCE = 1e-5
QUESTIONS = [
    ("USER: <image>\nWhich colour is it? ASSISTANT:", [0]),
    ("USER: Which shape is it? ASSISTANT:", []),
    ("USER: <image>\n<image>\nIs it red? ASSISTANT:", [1, 2]),
    ("USER: Is it red? Which colour is it? Which shape is it? ASSISTANT: red", []),
    ("USER: Which shape is it? <image>\nWhich colour is it? ASSISTANT:", [1]),
]
# The kernels of vLLM for CPUs need heads of 32 dimensions.
SIZES = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {
    "llama": lambda **kwargs: tr.LlamaConfig(**kwargs),
    "mistral": lambda **kwargs: tr.MistralConfig(num_key_value_heads=2, **{"sliding_window": None, **kwargs}),
    "qwen2": lambda **kwargs: tr.Qwen2Config(num_key_value_heads=1, **kwargs),
}
VISION = {
    "clip": tr.CLIPVisionConfig,
    # With its pooling head, which LLaVA does not read, vLLM fails on CPUs, with and without adapters.
    "siglip": partial(tr.SiglipVisionConfig, vision_use_head=False),
}


def make_image(seed):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (IMAGE_SIZE, IMAGE_SIZE, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def make_text_config(text, processor, **kwargs):
    tokenizer = processor.tokenizer
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    sizes = {**SIZES, "vocab_size": len(tokenizer), "max_position_embeddings": 512}
    return TEXT[text](**{**sizes, **ids, "initializer_range": 0.1, **kwargs})


def make_llava(processor, vision="clip", text="llama", **kwargs):
    config = tr.LlavaConfig(
        vision_config=VISION[vision](
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=8,
        ),
        text_config=make_text_config(text, processor, **kwargs),
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="default" if vision == "clip" else "full",
    )
    if vision == "siglip":
        processor.vision_feature_select_strategy, processor.num_additional_image_tokens = "full", 0
    torch.manual_seed(0)
    return tr.LlavaForConditionalGeneration(config)


class Bundled:
    """A bundle, and what `PeftModel` says."""

    def __init__(self, folder, model, processor, save=None, **kwargs):
        self.folder, self.processor = folder, processor
        self.bundle = str(folder / "bundle")
        model.save_pretrained(folder / "base", **(save or {}))
        processor.save_pretrained(folder / "base")
        load = type(model).from_pretrained
        adapt(load(folder / "base"), **kwargs).save_pretrained(folder / "tuned")
        peft_m2pt.bundle(folder / "base", folder / "tuned", self.bundle)
        self.base = load(folder / "base").eval()
        self.model = PeftModel.from_pretrained(load(folder / "base"), folder / "tuned").eval()

    def inputs(self, text, images=()):
        images = {"images": [make_image(seed) for seed in images]} if images else {}
        process = self.processor if images else getattr(self.processor, "tokenizer", self.processor)
        return process(text=[text], return_tensors="pt", **images)

    @torch.no_grad()
    def generate(self, text, images=(), model=None, **kwargs):
        """The tokens of the answer, and their log-probabilities."""
        inputs = self.inputs(text, images)
        options = {"do_sample": False, "max_new_tokens": 8, "output_logits": True, "return_dict_in_generate": True}
        output = (model or self.model).generate(**inputs, **{**options, **kwargs})
        tokens = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        scores = output.get("scores") or output.logits
        return tokens, [score[0].log_softmax(-1)[token].item() for score, token in zip(scores, tokens)]

    @torch.no_grad()
    def log_probabilities(self, text, images=(), tokens=()):
        """Those of each token behind the first one, of prompt and answer."""
        inputs = self.inputs(text, images)
        ids = torch.cat([inputs["input_ids"], torch.tensor([list(tokens)], dtype=torch.long)], dim=1)
        others = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
        logits = self.model(input_ids=ids, **others).logits[0, :-1].log_softmax(-1)
        return logits.gather(1, ids[0, 1:, None])[:, 0].tolist()


@contextlib.contextmanager
def started(bundle, **kwargs):
    """vLLM in its offline form. Its engine runs in a process of its own."""
    options = {"dtype": "float32", "max_model_len": 256, "block_size": 32, "seed": 0}
    llm = LLM(bundle, **{**options, **kwargs})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def ask(llm, questions, **kwargs):
    prompts = [
        {"prompt": text, **({"multi_modal_data": {"image": list(map(make_image, images))}} if images else {})}
        for text, images in questions
    ]
    options = {"temperature": 0, "max_tokens": 8, "logprobs": 0}
    return llm.generate(prompts, SamplingParams(**{**options, **kwargs}), use_tqdm=False)


def answer_of(output):
    tokens = list(output.token_ids)
    return tokens, [entry[token].logprob for token, entry in zip(tokens, output.logprobs)]


def check(bundled, llm, questions=QUESTIONS, expected_options=(), **kwargs):
    """Each answer has the tokens of `generate`, and not those of the base model."""
    differing = 0
    for question, output in zip(questions, ask(llm, questions, **kwargs), strict=True):
        tokens, expected = bundled.generate(*question, **dict(expected_options))
        found, log_probabilities = answer_of(output.outputs[0])
        assert found == tokens
        assert log_probabilities == pytest.approx(expected, abs=TOLERANCE, rel=0)
        assert len(output.prompt_token_ids) == bundled.inputs(*question)["input_ids"].shape[1]
        differing += tokens != bundled.generate(*question, model=bundled.base, **dict(expected_options))[0]
    assert differing > len(questions) / 2


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    processor = make_processor()
    return Bundled(tmp_path_factory.mktemp("llava"), make_llava(processor), processor)


@pytest.fixture(scope="module")
def compiled(llava):
    """With vLLM's defaults: compiled, chunked prefill, a prefix cache."""
    with started(llava.bundle, disable_log_stats=False) as llm:
        yield llm


def test_images_and_texts(llava, compiled):
    check(llava, compiled)


def test_a_long_answer(llava, compiled):
    longer = {"max_new_tokens": 150, "min_new_tokens": 150}
    outputs = ask(compiled, QUESTIONS, max_tokens=150, min_tokens=150)
    for question, output in zip(QUESTIONS, outputs, strict=True):
        assert answer_of(output.outputs[0])[0] == llava.generate(*question, **longer)[0]


def test_a_penalty_for_tokens_of_the_prompt(llava, compiled):
    found = [answer_of(output.outputs[0])[0] for output in ask(compiled, QUESTIONS, repetition_penalty=1.7)]
    assert found == [llava.generate(*question, repetition_penalty=1.7)[0] for question in QUESTIONS]
    assert found != [llava.generate(*question)[0] for question in QUESTIONS]


def test_sampling(llava, compiled):
    """Several answers to each question, again by a seed, each with the probability that the model gives it."""
    options = {"temperature": 1.0, "n": 3, "seed": 5, "max_tokens": 12}
    outputs, again = (ask(compiled, QUESTIONS, **options) for _ in range(2))
    for question, output, same in zip(QUESTIONS, outputs, again, strict=True):
        assert [answer.token_ids for answer in output.outputs] == [answer.token_ids for answer in same.outputs]
        assert len({tuple(answer.token_ids) for answer in output.outputs}) > 1
        for answer in output.outputs:
            tokens, found = answer_of(answer)
            expected = llava.log_probabilities(*question, tokens)[-len(tokens) :]
            assert found == pytest.approx(expected, abs=TOLERANCE, rel=0)


def test_log_probabilities_of_the_prompt(llava, compiled):
    for question, output in zip(QUESTIONS, ask(compiled, QUESTIONS, prompt_logprobs=0), strict=True):
        first, *entries = output.prompt_logprobs
        found = [entry[token].logprob for token, entry in zip(output.prompt_token_ids[1:], entries, strict=True)]
        assert first is None
        assert found == pytest.approx(llava.log_probabilities(*question), abs=TOLERANCE, rel=0)


def test_the_prefix_cache(llava, compiled):
    text = "USER: " + "Which colour is it? Which shape is it? " * 4 + "ASSISTANT:"
    [first] = ask(compiled, [(text, [])])
    answer = compiled.get_tokenizer().decode(first.outputs[0].token_ids)
    follow_up = f"{text}{answer} USER: Is it red? ASSISTANT:"
    [second] = ask(compiled, [(follow_up, [])])
    assert first.num_cached_tokens == 0 < second.num_cached_tokens < len(second.prompt_token_ids)
    assert answer_of(second.outputs[0])[0] == llava.generate(follow_up)[0]
    [third] = ask(compiled, [(follow_up, [])])
    assert answer_of(third.outputs[0])[0] == llava.generate(follow_up)[0]
    assert third.num_cached_tokens <= len(third.prompt_token_ids)


def test_no_room_for_the_prompts(llava, compiled):
    num_prompts, longest = 5, 256
    tokens = [10] * (longest - num_prompts)
    with pytest.raises(VLLMValidationError, match="5 textual prompts of the adapter"):
        compiled.generate({"prompt_token_ids": tokens}, SamplingParams(max_tokens=1), use_tqdm=False)
    [output] = compiled.generate(
        {"prompt_token_ids": tokens[:-1]}, SamplingParams(max_tokens=9, ignore_eos=True), use_tqdm=False
    )
    assert len(output.outputs[0].token_ids) == 1 and output.outputs[0].finish_reason == "length"


def test_compiled_code_of_an_earlier_start(llava, compiled):
    with started(llava.bundle) as llm:
        check(llava, llm)


def preemptions(llm):
    return next(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")


def test_small_chunks_and_a_small_cache(llava):
    """Chunks are shorter than the rows of prompts, and requests are stopped and computed anew."""
    longer = {"max_new_tokens": 60, "min_new_tokens": 60}
    options = {"max_num_batched_tokens": 4, "max_num_seqs": 4, "num_gpu_blocks_override": 9}
    with started(llava.bundle, enforce_eager=True, disable_log_stats=False, **options) as llm:
        check(llava, llm, QUESTIONS, longer, max_tokens=60, min_tokens=60)
        assert preemptions(llm) > 0


FAMILIES = {
    "siglip, qwen2, low rank": (("siglip", "qwen2"), {"connector_rank": 2}),
    "siglip, mistral, frozen connector": (("siglip", "mistral"), {"tune_connector": False}),
    "clip, qwen2, no interaction": (("clip", "qwen2"), {"num_interaction_tokens": 0, "num_textual_tokens": 9}),
    "clip, llama, textual": (("clip", "llama"), {"num_visual_tokens": 0, "tune_connector": False}),
    "clip, mistral, visual": (("clip", "mistral"), {"num_textual_tokens": 0, "num_interaction_tokens": 0}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name, tmp_path):
    """With another number of prompts each, in compiled models that share a cache of compiled code."""
    parts, kwargs = FAMILIES[name]
    processor = make_processor()
    bundled = Bundled(tmp_path, make_llava(processor, *parts), processor, **kwargs)
    with started(bundled.bundle) as llm:
        check(bundled, llm)


@pytest.mark.parametrize("text", TEXT)
def test_language_models_alone(text, tmp_path):
    processor = make_processor()
    torch.manual_seed(0)
    model = tr.AutoModelForCausalLM.from_config(make_text_config(text, processor))
    kwargs = {"num_visual_tokens": 0, "num_interaction_tokens": 0}
    bundled = Bundled(tmp_path, model, processor.tokenizer, **kwargs)
    with started(bundled.bundle, enforce_eager=True) as llm:
        check(bundled, llm, [question for question in QUESTIONS if not question[1]])


# A processor without videos, which would need torchvision.
IMAGES_ONLY = """
from transformers import AutoProcessor, PaddleOCRVLProcessor, Qwen2VLConfig
from transformers.processing_utils import MultiModalData


class ImagesOnlyProcessor(PaddleOCRVLProcessor):
    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs):
        counts = [self.image_processor.get_number_of_image_patches(*size, {}) for size in image_sizes or ()]
        tokens = [count // self.image_processor.merge_size**2 for count in counts]
        return MultiModalData(num_image_tokens=tokens, num_image_patches=counts)


def register():
    AutoProcessor.register(Qwen2VLConfig, ImagesOnlyProcessor, exist_ok=True)
"""


@pytest.fixture
def images_only(tmp_path, monkeypatch):
    """Its class, which all processes know."""
    folder = tmp_path / "installed"
    (folder / "images_only-1.dist-info").mkdir(parents=True)
    (folder / "images_only.py").write_text(IMAGES_ONLY)
    (folder / "images_only-1.dist-info/METADATA").write_text("Name: images_only\nVersion: 1\n")
    entry_points = "[vllm.general_plugins]\nimages_only = images_only:register\n"
    (folder / "images_only-1.dist-info/entry_points.txt").write_text(entry_points)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    module = importlib.import_module("images_only")
    module.register()
    return module.ImagesOnlyProcessor


def make_qwen2_vl(processor_class):
    processor = make_processor()
    tokenizer = processor.tokenizer
    size = {"shortest_edge": 16 * 16, "longest_edge": 24 * 24}
    images = tr.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, size=size)
    config = tr.Qwen2VLConfig(
        vision_config={
            "depth": 2,
            "embed_dim": 64,
            "hidden_size": 128,
            "mlp_ratio": 2,
            "num_heads": 4,
            "patch_size": 4,
        },
        text_config={
            **SIZES,
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
            "pad_token_id": tokenizer.pad_token_id,
            "initializer_range": 0.1,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_id=len(tokenizer) - 1,
        vision_start_token_id=len(tokenizer) - 2,
        vision_end_token_id=len(tokenizer) - 3,
    )
    torch.manual_seed(0)
    model = tr.Qwen2VLForConditionalGeneration(config)
    return model, processor_class(images, tokenizer, chat_template=processor.chat_template)


def test_positions_with_three_axes(images_only, tmp_path):
    bundled = Bundled(tmp_path, *make_qwen2_vl(images_only))
    with pytest.raises(ValueError, match="videos .* --limit-mm-per-prompt"):
        make_vllm_config(bundled.bundle)
    longer = {"max_new_tokens": 24, "min_new_tokens": 24}
    no_videos = {"limit_mm_per_prompt": {"video": 0}}
    with started(bundled.bundle, enforce_eager=True, max_num_batched_tokens=64, **no_videos) as llm:
        check(bundled, llm, QUESTIONS, longer, max_tokens=24, min_tokens=24)


def make_vllm_config(bundle, **kwargs):
    options = {"dtype": "float32", "max_model_len": 128, **kwargs}
    return EngineArgs(model=str(bundle), **options).create_engine_config()


def test_no_prefix_is_shared_with_another_adapter(llava, tmp_path):
    """Caches that servers share find prefixes by hashes: the same for one adapter, and others for another one."""
    init_none_hash(sha256)
    hashes = {}
    for name, seed in (("one", 1), ("another", 2), ("one again", 1)):
        tuned = adapt(tr.LlavaForConditionalGeneration.from_pretrained(llava.folder / "base"))
        randomise(tuned, seed)
        tuned.save_pretrained(tmp_path / name / "tuned")
        peft_m2pt.bundle(llava.folder / "base", tmp_path / name / "tuned", tmp_path / name / "bundle")
        settings = Settings.of(make_vllm_config(tmp_path / name / "bundle"))
        for salt in (None, "of a user"):
            params = SamplingParams(max_tokens=1)
            request = EngineCoreRequest(name, list(range(40)), None, params, None, 0.0, None, salt, None)
            hasher = get_request_block_hasher(16, sha256)
            hashes[name, salt] = Request.from_engine_core_request(lengthened(request, settings), hasher).block_hashes
    assert hashes["one", None] == hashes["one again", None] and len(hashes["one", None]) == 2
    del hashes["one again", None], hashes["one again", "of a user"]
    assert len({block for blocks in hashes.values() for block in blocks}) == 8


OPTIONS = {
    "lora_config was .*--enable-lora": {"enable_lora": True},
    "quantization='fp8'": {"quantization": "fp8"},
    "pipeline_parallel_size=2": {"pipeline_parallel_size": 2},
    "enable_prompt_embeds=True": {"enable_prompt_embeds": True},
    "load_format='dummy'": {"load_format": "dummy"},
    "leave out the vision encoder": {"limit_mm_per_prompt": {"image": 0}},
    "runner_type='pooling'": {"runner": "pooling"},
    "kv_transfer_config": {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
    "speculative_config": {
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    },
}


@pytest.mark.parametrize("message", OPTIONS)
def test_refused_options(message, llava):
    with pytest.raises(ValueError, match=message):
        make_vllm_config(llava.bundle, **OPTIONS[message])


ADAPTERS = {
    "interaction_placement='image'": {"interaction_placement": "image"},
    "modules_to_save=": {"modules_to_save": ["lm_head"]},
    "textual_layers or exclude_modules leave 1 of 2": {"textual_layers": [0]},
    "exclude_modules leave 1 of 2": {"exclude_modules": ["language_model.layers.1.self_attn"]},
}


@pytest.mark.parametrize("message", ADAPTERS)
def test_refused_adapters(message, tmp_path):
    processor = make_processor()
    bundled = Bundled(tmp_path, make_llava(processor), processor, **ADAPTERS[message])
    with pytest.raises(ValueError, match=message):
        make_vllm_config(bundled.bundle)


def test_refused_weights(llava, tmp_path):
    shutil.copytree(llava.bundle, tmp_path / "bundle")
    (tmp_path / "bundle/model.safetensors").unlink()
    torch.save(llava.base.state_dict(), tmp_path / "bundle/pytorch_model.bin")
    with pytest.raises(ValueError, match="vLLM would leave out pytorch_model.bin"):
        make_vllm_config(tmp_path / "bundle")


def test_plugins_that_are_loaded_twice():
    register()
    wrapped = EngineCore.preprocess_add_request
    register()
    assert EngineCore.preprocess_add_request is wrapped and not hasattr(wrapped.__wrapped__, "__wrapped__")


def test_refused_requests(llava):
    settings = Settings.of(make_vllm_config(llava.bundle))
    params = SamplingParams(max_tokens=1)
    request = EngineCoreRequest("one", [5], None, params, None, 0.0, None, None, None, resumable=True)
    with pytest.raises(UnsupportedModelError, match="'one' sends its prompt in parts"):
        lengthened(request, settings)


def test_refused_windows(tmp_path):
    processor = make_processor()
    model = make_llava(processor, "clip", "mistral", sliding_window=100)
    bundled = Bundled(tmp_path, model, processor)
    with pytest.raises(
        ValueError, match=r"sliding_window=100 of '.*layers.0.self_attn'.* --max-model-len 100 or less"
    ):
        make_vllm_config(bundled.bundle)
    with started(bundled.bundle, max_model_len=100, enforce_eager=True) as llm:
        check(bundled, llm)


def test_an_adapter_of_another_base(llava, tmp_path):
    shutil.copytree(llava.bundle, tmp_path / "bundle")
    processor = make_processor()
    other = adapt(make_llava(processor, num_hidden_layers=3))
    other.save_pretrained(tmp_path / "tuned")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(tmp_path / "tuned" / name, tmp_path / "bundle" / name)
    with pytest.raises(ValueError, match="layers.2.self_attn"):
        make_vllm_config(tmp_path / "bundle")


def test_models_that_were_not_tried(tmp_path):
    config = tr.GemmaConfig(**SIZES, num_key_value_heads=1, head_dim=32, vocab_size=len(make_processor().tokenizer))
    kwargs = {"num_visual_tokens": 0, "num_interaction_tokens": 0}
    bundled = Bundled(tmp_path, tr.GemmaForCausalLM(config), make_processor().tokenizer, **kwargs)
    with pytest.raises(ValueError, match="model_type='gemma' was not tried in vLLM .* Tried are 'llava' with"):
        make_vllm_config(bundled.bundle)


def test_versions_that_were_not_tried(monkeypatch, caplog_vllm):
    check_version(vllm.__version__)
    assert not caplog_vllm.text
    check_version("99.0")
    assert "vLLM 99.0 was not tried with M2PT" in caplog_vllm.text
    monkeypatch.setitem(PRIVATE, EngineCore.preprocess_add_request, ("self", "another"))
    with pytest.raises(UnsupportedModelError, match=r"99.0 was not tried .* EngineCore.preprocess_add_request takes"):
        check_version("99.0")


@pytest.fixture
def caplog_vllm(caplog):
    logger = logging.getLogger("vllm")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("save", [{}, {"max_shard_size": "100KB"}], ids=["one file", "shards"])
@pytest.mark.parametrize("statement", ["", "import peft_m2pt", "options = {'hf_overrides': {'model_type': 'llama'}}"])
def test_without_the_plugin(statement, save, tmp_path):
    """A bundle is never answered for by the base model."""
    processor = make_processor()
    torch.manual_seed(0)
    model = tr.AutoModelForCausalLM.from_config(make_text_config("llama", processor))
    kwargs = {"num_visual_tokens": 0, "num_interaction_tokens": 0}
    bundled = Bundled(tmp_path, model, processor.tokenizer, save, **kwargs)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(statement=statement, bundle=bundled.bundle))
    environment = {**os.environ, "VLLM_PLUGINS": "none"}
    ran = subprocess.run([sys.executable, program], capture_output=True, text=True, env=environment)
    assert ran.returncode != 0 and "ANSWER" not in ran.stdout
    assert re.search(
        "model type `peft_m2pt`|no module or parameter named '(base_model|peft_m2pt)'", ran.stdout + ran.stderr
    )


PROGRAM = """
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    options = {{}}
    {statement}
    llm = LLM("{bundle}", dtype="float32", max_model_len=64, enforce_eager=True, **options)
    print("ANSWER", llm.generate("USER:"))
"""


# The command `vllm`, which asks for the version of a package that has another name in the build for CPUs.
VLLM = """
import importlib.metadata
import sys

version = importlib.metadata.version
importlib.metadata.version = lambda name: f"{version('vllm-cpu')}+cpu" if name == "vllm" else version(name)

from vllm.entrypoints.cli.main import main

sys.exit(main())
"""


class Server:
    """`vllm serve BUNDLE`."""

    def __init__(self, bundled, folder, *arguments):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = folder / "log"
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                VLLM,
                "serve",
                bundled.bundle,
                "--host",
                "127.0.0.1",
                "--port",
                str(self.port),
                "--dtype",
                "float32",
                *arguments,
            ],
            stdout=self.log.open("wb"),
            stderr=subprocess.STDOUT,
        )
        self.model = bundled.bundle
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none")

    def chat(self, text, images=(), **kwargs):
        images = [{"type": "image_url", "image_url": {"url": as_url(make_image(seed))}} for seed in images]
        messages = [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]
        options = {"max_tokens": 8, "temperature": 0, "extra_body": {"return_token_ids": True}, **kwargs}
        return self.client.chat.completions.create(model=self.model, messages=messages, **options)


def as_url(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def as_prompt(text, images):
    return f"USER: {'<image>' + chr(10) if images else ''}{('<image>' + chr(10)) * (len(images) - 1)}{text} ASSISTANT:"


def test_the_server(llava, tmp_path):
    server = Server(llava, tmp_path, "--enforce-eager", "--block-size", "32", "--enable-prompt-tokens-details")
    questions = [("Which colour is it?", [0]), ("Which shape is it?", []), ("Is it red?", [1, 2]), ("Is it red?", [])]
    try:
        wait_for(server, seconds=600)
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda question: server.chat(*question), questions * 2))
        for question, answer in zip(questions * 2, answers, strict=True):
            prompt = as_prompt(*question), question[1]
            assert answer.choices[0].token_ids == llava.generate(*prompt)[0]
            assert answer.usage.prompt_tokens == llava.inputs(*prompt)["input_ids"].shape[1]
        chunks = server.chat("Which shape is it?", [1], stream=True)
        choices = [choice for chunk in chunks for choice in chunk.choices]
        streamed = [token for choice in choices for token in getattr(choice, "token_ids", None) or ()]
        assert streamed == llava.generate(as_prompt("Which shape is it?", [1]), [1])[0]
        long = "Which colour is it? Which shape is it? " * 5
        usages = [server.chat(long).usage for _ in range(2)]
        first, second = (getattr(usage.prompt_tokens_details, "cached_tokens", 0) or 0 for usage in usages)
        assert first == 0 < second < usages[1].prompt_tokens
    finally:
        server.process.terminate()
        server.process.wait()
