"""examples/plain_loop.py: a loop with accelerate alone."""

import re

import torch
from helpers.shapes import draw, import_examples, make_model, make_processor
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import LlavaForConditionalGeneration


def test_plain_loop(monkeypatch, tmp_path, capsys):
    """What it saves is what it has trained: prompts and the connector, with which the answers are more likely."""
    examples = import_examples(monkeypatch, tmp_path)
    import plain_loop

    draw(tmp_path / "data", 24)
    for path in (tmp_path / "data/images").iterdir():
        path.rename(tmp_path / "data" / path.name)
    processor = make_processor()
    processor.save_pretrained(tmp_path / "model")
    make_model(processor).save_pretrained(tmp_path / "model")
    data = str(tmp_path / "data/annotation.json")
    plain_loop.train(str(tmp_path / "model"), data, str(tmp_path / "adapter"), epochs=2, rate=3e-2)
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", capsys.readouterr().out)]
    assert len(losses) == 6 and losses[-1] < 0.9 * losses[0]

    reader = examples.conversations.ImageReader(tmp_path / "data", "error", tmp_path / "bad.jsonl")
    rows = examples.conversations.Conversations(examples.conversations.load(data, "train", False), reader)
    base = LlavaForConditionalGeneration.from_pretrained(tmp_path / "model")
    collator = examples.answers.AnswerCollator(processor, base.generation_config)
    batch = next(iter(DataLoader(rows, batch_size=24, collate_fn=collator)))
    with torch.no_grad():
        before = base(**batch).loss
        after = PeftModel.from_pretrained(base, tmp_path / "adapter")(**batch).loss
    assert after < 0.9 * before
