"""The modules of the training script, and data and a model for it."""

import json

import pytest
from helpers.shapes import draw, import_examples, make_model, make_processor, teach_words


@pytest.fixture
def examples(monkeypatch, tmp_path):
    return import_examples(monkeypatch, tmp_path)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder with data, and with a model and its processor."""
    folder = tmp_path_factory.mktemp("train")
    draw(folder / "data")
    processor = make_processor()
    processor.save_pretrained(folder / "model")
    model = make_model(processor)
    teach_words(model, processor)
    model.save_pretrained(folder / "model")
    return folder


@pytest.fixture
def rows(folder):
    return json.loads((folder / "data" / "annotation.json").read_text())[:6]
