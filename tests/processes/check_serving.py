"""Bundles in the real server of transformers, for which `make test-serving` makes an environment of its own."""

import base64
import io
import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
import transformers
from helpers.models import adapt
from helpers.servers import wait_for
from helpers.shapes import IMAGE_SIZE, make_model, make_processor
from packaging.version import Version
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForCausalLM

import peft_m2pt


ROOT = Path(__file__).parent.parent.parent
MAX_TOKENS = 8
ADAPTERS = {"layers": {}, "image": {"interaction_placement": "image"}}


def make_image(seed):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (IMAGE_SIZE, IMAGE_SIZE, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def as_url(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def ask(text, image_url=None):
    """A conversation in the form of OpenAI."""
    images = [{"type": "image_url", "image_url": {"url": image_url}}] if image_url else []
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


class Served:
    """A bundle, what `generate` of a `PeftModel` answers, and a server."""

    def __init__(self, folder, model, processor, kwargs, *arguments):
        self.bundle = folder / "bundle"
        model.save_pretrained(folder / "base")
        processor.save_pretrained(folder / "base")
        load = type(model).from_pretrained
        adapt(load(folder / "base"), **kwargs).save_pretrained(folder / "tuned")
        peft_m2pt.bundle(folder / "base", folder / "tuned", self.bundle)
        self.base = load(folder / "base").eval()
        self.model = PeftModel.from_pretrained(load(folder / "base"), folder / "tuned").eval()
        self.processor = processor
        if "interaction_placement" in kwargs:
            self.processor = peft_m2pt.adapt_processor(processor, self.model.peft_config["default"])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "peft_m2pt", "serve", self.bundle, "--port", str(self.port), *arguments]
        self.log = folder / "log"
        self.process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--device", "cpu"],
            stdout=self.log.open("wb"),
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")},
        )
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none")

    def generate(self, text, image=None, model=None):
        messages = [
            {"role": "user", "content": [*([{"type": "image"}] if image else []), {"type": "text", "text": text}]}
        ]
        prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        images = {"images": [image]} if image else {}
        inputs = self.processor(text=[prompt], return_tensors="pt", **images)
        with torch.no_grad():
            output = (model or self.model).generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
        tokens = output[0, inputs["input_ids"].shape[1] :]
        return self.processor.decode(tokens, skip_special_tokens=True)

    def request(self, messages, **kwargs):
        return self.client.chat.completions.create(
            model=str(self.bundle),
            messages=messages,
            max_tokens=MAX_TOKENS,
            temperature=0,
            extra_body={"generation_config": json.dumps({"do_sample": False, "max_new_tokens": MAX_TOKENS})},
            **kwargs,
        )

    def answer(self, text, image=None):
        messages = ask(text, as_url(image) if image else None)
        return self.request(messages).choices[0].message.content


@pytest.fixture(scope="module", params=ADAPTERS)
def served(request, tmp_path_factory):
    processor = make_processor()
    folder = tmp_path_factory.mktemp(request.param)
    yield from serve(folder, make_model(processor), processor, ADAPTERS[request.param])


@pytest.fixture(scope="module", params=[[], ["--continuous-batching"]], ids=["plain", "continuous batching"])
def served_text(request, tmp_path_factory):
    """A language model alone."""
    processor = make_processor()
    config = make_model(processor).config.text_config
    torch.manual_seed(0)
    kwargs = {"num_visual_tokens": 0, "num_interaction_tokens": 0}
    tokenizer = processor.tokenizer
    # The server makes one text of the parts of a message.
    text = "{{ content if content is string else content[0]['text'] }}"
    tokenizer.chat_template = "{% set content = messages[0]['content'] %}" + text
    folder = tmp_path_factory.mktemp("text")
    yield from serve(folder, AutoModelForCausalLM.from_config(config), tokenizer, kwargs, *request.param)


def serve(*args):
    served = Served(*args)
    try:
        wait_for(served, seconds=120)
        yield served
    finally:
        served.process.terminate()
        served.process.wait()


def test_an_image(served):
    image = make_image(0)
    expected = served.generate("Which colour is this?", image)
    assert served.answer("Which colour is this?", image) == expected
    if not served.model.peft_config["default"].interaction_placement == "image":
        assert expected != served.generate("Which colour is this?", image, served.base)


def test_streaming(served):
    image = make_image(1)
    messages = ask("Which shape is this?", as_url(image))
    parts = [chunk.choices[0].delta.content or "" for chunk in served.request(messages, stream=True) if chunk.choices]
    assert len(parts) > 1 and "".join(parts) == served.generate("Which shape is this?", image)


def test_text(served):
    assert served.answer("What is this?") == served.generate("What is this?")


def test_several_at_once(served):
    questions = [("Which colour?", make_image(i)) for i in range(3)] + [("Which shape?", None)] * 2
    with ThreadPoolExecutor(len(questions)) as pool:
        answers = list(pool.map(lambda question: served.answer(*question), questions))
    assert answers == [served.generate(*question) for question in questions]


def test_a_broken_image(served):
    url = "data:image/png;base64," + base64.b64encode(b"no image").decode()
    with pytest.raises(openai.InternalServerError):
        served.request(ask("Which colour?", url))
    assert served.answer("What is this?") == served.generate("What is this?")


def test_language_models_alone(served_text):
    questions = [f"What is {'this' * i}?" for i in range(5)]
    answers = [served_text.generate(question) for question in questions]
    assert answers != [served_text.generate(question, model=served_text.base) for question in questions]
    assert served_text.answer(questions[0]) == answers[0]
    with ThreadPoolExecutor(len(questions)) as pool:
        assert list(pool.map(served_text.answer, questions)) == answers
    chunks = served_text.request(ask(questions[1]), stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == answers[1]
    is_batching = "ontinuousBatching" in served_text.log.read_text()
    assert is_batching == ("--continuous-batching" in served_text.process.args)


def test_models(served):
    listed = [model.id for model in served.client.models.list()]
    # Before, they are those of the cache.
    assert listed == ([str(served.bundle)] if Version(transformers.__version__) >= Version("5.24") else [])
