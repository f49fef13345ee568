"""
`python -m benchmarks.serving`: what M2PT costs in vLLM, beside the bare base model and LoRA in the same vLLM.

Each is served by an engine of its own, and they take turns. All use vLLM's Transformers backend, compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import vllm
from peft import LoraConfig, get_peft_model
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

import peft_m2pt
from peft_m2pt.bundles.loading import is_bundle

from .models import DIMS, Llava, make_model


NEW_TOKENS = 64
NUM_REQUESTS = 32
LORA_TARGETS = r".*language_model.*self_attn\.(q_proj|v_proj)"


def make_folders(dims: Llava, folder: Path) -> None:
    """Writes the base model, a bundle and a LoRA adapter."""
    size, image_token = dims.vision["image_size"], dims.text["vocab_size"] - 1
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<image>": image_token}
    vocabulary |= {str(i): i for i in range(3, image_token)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=dims.vision["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    make_model(dims).save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    prompts = {"num_visual_tokens": 20, "num_textual_tokens": 10, "num_interaction_tokens": 20}
    config = peft_m2pt.M2PTConfig(**prompts, connector_rank=None)
    get_peft_model(make_model(dims), config).save_pretrained(folder / "tuned")
    peft_m2pt.bundle(folder / "base", folder / "tuned", folder / "bundle")
    lora = LoraConfig(r=8, target_modules=LORA_TARGETS, init_lora_weights=False)
    get_peft_model(make_model(dims), lora).save_pretrained(folder / "lora")


class Served:
    """An engine, and requests to it."""

    def __init__(self, dims: Llava, model: Path, lora: Path | None = None) -> None:
        options = {"enable_lora": True, "max_lora_rank": 8} if lora else {}
        # The bundle is a model of this backend by itself.
        options |= {} if is_bundle(model) else {"model_impl": "transformers"}
        self.dims = dims
        self.lora = LoRARequest("lora", 1, str(lora)) if lora else None
        self.llm = LLM(
            str(model),
            dtype="float32",
            max_model_len=1024,
            enable_prefix_caching=False,
            max_num_batched_tokens=2048,
            limit_mm_per_prompt={"image": 1},
            **options,
        )

    def seconds(self, num_requests: int, new_tokens: int, seed: int) -> float:
        """How long requests with one image each take together."""
        generator = torch.Generator().manual_seed(seed)
        size, last = self.dims.vision["image_size"], self.dims.text["vocab_size"] - 1
        prompts = []
        for _ in range(num_requests):
            text = torch.randint(3, last, (self.dims.num_text_tokens,), generator=generator).tolist()
            pixels = torch.randint(256, (size, size, 3), generator=generator, dtype=torch.uint8)
            image = Image.fromarray(pixels.numpy())
            prompts.append({"prompt_token_ids": [last, *text], "multi_modal_data": {"image": image}})
        params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        start = time.perf_counter()
        self.llm.generate(prompts, params, use_tqdm=False, lora_request=self.lora)
        return time.perf_counter() - start

    def seconds_per_token(self, seed: int) -> float:
        """Of one request, without its prefill."""
        short, long = (self.seconds(1, number, seed) for number in (1, NEW_TOKENS + 1))
        return (long - short) / NEW_TOKENS

    def tokens_per_second(self, seed: int) -> float:
        """Of requests that come at once, with their prefill."""
        return NUM_REQUESTS * NEW_TOKENS / self.seconds(NUM_REQUESTS, NEW_TOKENS, seed)


def measure(served: dict[str, Served], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Lets the engines take turns, in another order each time."""
    kinds: dict[str, Callable[[Served, int], float]] = {
        "seconds per token": Served.seconds_per_token,
        "tokens per second": Served.tokens_per_second,
    }
    measured: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in served} for kind in kinds}
    names = list(served)
    for engine in served.values():
        engine.seconds(2, 4, seed=0)
    for kind, function in kinds.items():
        for turn in range(repeats):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                measured[kind][name].append(function(served[name], turn + 1))
                print(f"{kind}, {name}: {measured[kind][name][-1]:.4f}", flush=True)
    return measured


def ratios(measured: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """Each against the base model, in the same turn."""
    rows = []
    for kind, times in measured.items():
        for name in times:
            against = [own / base for own, base in zip(times[name], times["base"], strict=True)]
            rows.append(
                {
                    "kind": kind,
                    "name": name,
                    "median": statistics.median(times[name]),
                    "ratio": statistics.median(against),
                    "lowest": min(against),
                    "highest": max(against),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.serving", description="Measures M2PT in vLLM, on the CPU.")
    parser.add_argument("--dims", choices=DIMS, default="medium", help="Dimensions of the model (default: medium).")
    parser.add_argument("--repeats", type=int, default=5, help="Measurements of each number (default: 5).")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results", help="Folder for the results."
    )
    arguments = parser.parse_args()
    dims = DIMS[arguments.dims]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_folders(dims, folder)
        served = {
            "base": Served(dims, folder / "base"),
            "M2PT (20, 10)": Served(dims, folder / "bundle"),
            "LoRA r=8": Served(dims, folder / "base", folder / "lora"),
        }
        measured = measure(served, arguments.repeats)
    rows = ratios(measured)
    results = {
        "dims": arguments.dims,
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "versions": {"vllm": vllm.__version__, "torch": torch.__version__, "peft-m2pt": peft_m2pt.__version__},
        "measured": measured,
        "ratios": rows,
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / f"{results['date']}-{arguments.dims}-vllm.json"
    file.write_text(json.dumps(results, indent=1) + "\n")
    for row in rows:
        print("{kind}, {name}: {median:.4f}, {ratio:.3f} ({lowest:.3f} to {highest:.3f}) of base".format(**row))
    print(f"written: {file}")


if __name__ == "__main__":
    main()
