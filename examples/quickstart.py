"""
M2PT in a few minutes on a laptop: a small LLaVA that knows digits in print learns to read handwriting.

The model is pretrained once, on digits drawn with fonts (see `tiny_llava.py`). Then it is frozen, and multimodal
prompts are tuned on scans of real handwriting. One held-out instruction shows whether the prompts generalize.

    python examples/quickstart.py
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import datasets
import digits
import figure
import tiny_llava
import transformers
import vqa
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin, set_seed

from peft_m2pt import M2PTConfig


SEED = 0
LEARNING_RATE = 3e-3
HELD_OUT = "Write it as a word."
TUNED = [instruction for instruction in digits.INSTRUCTIONS if instruction != HELD_OUT]

CONFIG = M2PTConfig(num_visual_tokens=20, num_textual_tokens=10)


@dataclass(frozen=True)
class Plan:
    """The size of a run."""

    recipe: tiny_llava.Recipe
    tuning_steps: int
    num_test_images: int


FULL = Plan(tiny_llava.Recipe(), tuning_steps=250, num_test_images=360)
SHORT = Plan(tiny_llava.Recipe(num_images=2_000, vision_steps=60, steps=40), tuning_steps=20, num_test_images=60)


def load(folder: Path) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Loads a model and its processor from a folder."""
    if not Path(folder, "config.json").is_file():
        raise OSError(f"{folder} is not the folder of a model: it has no config.json.")
    model = AutoModelForImageTextToText.from_pretrained(folder)
    return model.to(PartialState().device), AutoProcessor.from_pretrained(folder)


def tune(base: PreTrainedModel, processor: ProcessorMixin, plan: Plan) -> tuple[PeftModel, list[dict[str, float]]]:
    """Adds prompts to a frozen model and tunes them. Returns the model and the log of losses."""
    set_seed(SEED)
    model = get_peft_model(base, CONFIG)
    images, _ = digits.handwritten_digits(plan.num_test_images, SEED)
    questions = digits.ask(images, TUNED)
    collator = vqa.AnswerCollator(processor)
    log = vqa.train(model, questions, collator, plan.tuning_steps, LEARNING_RATE, SEED, "Tuning with M2PT")
    return model, log


def test_questions(num_images: int) -> Dataset:
    """Returns all instructions for the held-out images."""
    _, images = digits.handwritten_digits(num_images, SEED)
    return digits.ask(images, list(digits.INSTRUCTIONS))


def accuracies(answers: list[str], questions: Dataset) -> dict[str, float]:
    """Returns the exact-match accuracy for each instruction."""
    right: dict[str, list[bool]] = {}
    for given, instruction, expected in zip(answers, questions["instruction"], questions["answer"]):
        right.setdefault(instruction, []).append(given == expected)
    return {instruction: mean(hits) for instruction, hits in right.items()}


def answer_with_saved(base: str, adapter: str, num_images: int) -> list[str]:
    """Answers the test questions with a saved adapter."""
    quiet()
    model, processor = load(Path(base))
    model = PeftModel.from_pretrained(model, adapter)
    return vqa.answer(model, processor, test_questions(num_images), "Answering")


def answer_in_fresh_process(base: Path, adapter: Path, num_images: int) -> list[str]:
    """Answers the test questions with a saved adapter, in a new Python process."""
    print("Answering again, with the saved adapter in a fresh process ...", flush=True)
    arguments = (str(base.resolve()), str(adapter.resolve()), num_images)
    code = f"import json, quickstart; print(json.dumps(quickstart.answer_with_saved(*{arguments})))"
    process = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    if process.returncode != 0:
        raise OSError(f"The saved adapter cannot be used in a fresh process:\n{process.stderr}")
    return json.loads(process.stdout.splitlines()[-1])


def run(base_folder: Path, output: Path, plan: Plan) -> None:
    """Tunes a model, compares it to the base model, and saves the adapter, the results and a figure."""
    base, processor = load(base_folder)
    questions = test_questions(plan.num_test_images)
    before = vqa.answer(base, processor, questions, "Answering before tuning")

    start = time.perf_counter()
    model, log = tune(base, processor, plan)
    seconds = time.perf_counter() - start
    after = vqa.answer(model, processor, questions, "Answering after tuning")

    vqa.save(output / "adapter", model)
    loaded = answer_in_fresh_process(base_folder, output / "adapter", plan.num_test_images)

    trainable, total = model.get_nb_trainable_parameters()
    results = {
        "accuracy": {"before": accuracies(before, questions), "after": accuracies(after, questions)},
        "trainable_parameters": trainable,
        "trainable_share": trainable / total,
        "tuning_seconds": seconds,
        "adapter_bytes": sum(file.stat().st_size for file in (output / "adapter").iterdir()),
        "same_answers_when_loaded": loaded == after,
        "loss": [{"step": entry["step"], "loss": entry["loss"]} for entry in log],
    }
    (output / "results.json").write_text(json.dumps(results, indent=2))
    figure.plot(results, questions, before, after, HELD_OUT, output / "quickstart.png")
    print(f"\n{model.base_model.describe()}\n\n{format_results(results)}\n\nSee {output / 'quickstart.png'}.")
    if loaded != after:
        raise OSError(f"The adapter in {output / 'adapter'} does not answer like the model that was saved.")


def format_results(results: dict[str, Any]) -> str:
    def row(instruction: str) -> str:
        before, after = (results["accuracy"][when][instruction] for when in ("before", "after"))
        return f"{instruction:<40}{before:>8.1%}{after:>9.1%}"

    parameters, share = results["trainable_parameters"], results["trainable_share"]
    return "\n".join(
        [
            f"{'Accuracy on held-out images':<40}{'before':>8}{'after':>9}",
            "-" * 57,
            *map(row, TUNED),
            row(HELD_OUT) + "   (held-out instruction)",
            "-" * 57,
            f"Trainable parameters        {parameters:,} ({share:.2%})",
            f"Tuning                      {results['tuning_seconds']:.0f} s",
            f"Adapter on disk             {results['adapter_bytes'] / 2**10:.0f} KiB",
            f"Loaded in a fresh process   {'same' if results['same_answers_when_loaded'] else 'DIFFERENT'} answers",
        ]
    )


def quiet() -> None:
    """Leaves one progress bar per phase, and hides warnings of other libraries about each other."""
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # matplotlib, about odd answers of a model that has learned little.
    warnings.filterwarnings("ignore", category=UserWarning, module="figure")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tune a small vision-language model on handwriting, with M2PT.")
    parser.add_argument(
        "--base", type=Path, help="folder of another LLaVA-type model with its processor, to use instead"
    )
    parser.add_argument(
        "--cache-dir",
        type=Path,
        default=Path.home() / ".cache" / "peft_m2pt",
        help="where to keep the pretrained small model (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("quickstart-output"),
        help="folder for adapter, results and figure (default: %(default)s)",
    )
    parser.add_argument("--short", action="store_true", help="run for less than a minute, and learn little")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    plan = SHORT if arguments.short else FULL
    quiet()
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
        base_folder = arguments.base or tiny_llava.pretrained(arguments.cache_dir, plan.recipe, SEED)
        run(base_folder, arguments.output, plan)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nerror: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
