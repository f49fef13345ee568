"""
Whether one learning rate suits models of several widths: `python -m benchmarks.comparison.widths --results FOLDER`.

The models are the quickstart's small LLaVA in three widths, each tuned on handwriting.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

from transformers import set_seed

from .experiments import experiments_of
from .handwriting import digits, quickstart, tiny_llava, vqa


WIDTHS = (64, 128, 256)
NUM_STEPS = 150


def last_loss(base_folder: Path, lr: float, method: str) -> float:
    """The mean loss of the last 25 steps."""
    base, processor = quickstart.load(base_folder)
    set_seed(0)
    [experiment] = experiments_of("a", [method])
    model = experiment.adapt(base)
    images, _ = digits.handwritten_digits(quickstart.FULL.num_test_images, quickstart.SEED)
    questions = digits.ask(images, quickstart.TUNED)
    log = vqa.train(model, questions, vqa.AnswerCollator(processor), NUM_STEPS, lr, 0, f"lr {lr:g}")
    # Losses are logged for every five steps.
    return sum(entry["loss"] for entry in log[-5:]) / 5


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.comparison.widths", description=__doc__)
    parser.add_argument("--results", type=Path, required=True, help="Where each run writes its file.")
    parser.add_argument("--cache-dir", type=Path, required=True, help="Where the base models are kept.")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3, 1e-2])
    parser.add_argument("--methods", nargs="+", default=["lora/rank-8", "m2pt/prompts-connector"])
    arguments = parser.parse_args()
    arguments.results.mkdir(parents=True, exist_ok=True)
    quickstart.quiet()
    for width in arguments.widths:
        base_folder = tiny_llava.pretrained(arguments.cache_dir, tiny_llava.Recipe(width=width), quickstart.SEED)
        for method, lr in itertools.product(arguments.methods, arguments.lr):
            file = arguments.results / f"{method.replace('/', '--')}-width-{width}-{lr:g}.json"
            if not file.exists():
                loss = last_loss(base_folder, lr, method)
                file.write_text(json.dumps({"method": method, "width": width, "lr": lr, "last loss": loss}))
                print(f"{method}, width {width}, lr {lr:g}: {loss:.4f}", flush=True)


if __name__ == "__main__":
    main()
