"""
A training run that tests/training/test_processes.py starts in several processes, and in its own for comparison.

Every step has a batch of four samples in all. The first process gets the first half of it, the second the other one.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState
from helpers.models import adapt, make_inputs, without_labels
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import LlavaForConditionalGeneration, Trainer, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled


# Which samples of each step have an image.
IMAGES = ["ii ii", "ii --", "-- ii", "-i --", "i- -i", "-- --"]
SAVED_STEP = 3
INITS = {"vocabulary": {}, "states": {"init_token_ids": [5, 6, 7]}}


def make_samples() -> list[dict[str, torch.Tensor]]:
    samples = []
    for i, kind in enumerate("".join(IMAGES).replace(" ", "")):
        batch = make_inputs("right", images=kind == "i", seed=i)
        samples.append({name: value[i % 2] for name, value in batch.items()})
    return samples


def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch, without `pixel_values` if no sample of it has an image."""
    if is_deepspeed_zero3_enabled() and not any("pixel_values" in sample for sample in samples):
        # All processes have to call the vision encoder: a sample with an image, of which nothing is learned.
        sample = {name: value[0] for name, value in make_inputs().items()}
        samples = [*samples, {**sample, "labels": torch.full_like(sample["labels"], -100)}]
    names = dict.fromkeys(name for sample in samples for name in sample)
    return {name: torch.stack([sample[name] for sample in samples if name in sample]) for name in names}


def make_trainer(base: Path, folder: Path, init_prompts: str, adapter: Path | None = None, **kwargs) -> Trainer:
    # accelerate starts DeepSpeed on CPUs only if it was not asked for CPUs ...
    uses_deepspeed = "ACCELERATE_USE_DEEPSPEED" in os.environ
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=len(IMAGES),
        learning_rate=0.05,
        train_sampling_strategy="sequential",
        ddp_find_unused_parameters=False,
        save_strategy="steps",
        save_steps=SAVED_STEP,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not uses_deepspeed,
        ddp_backend="gloo" if uses_deepspeed else None,
        **kwargs,
    )
    if "ACCELERATE_USE_FSDP" in os.environ:
        # ... and FSDP, which can use them too, only if it takes them for GPUs.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    arguments.per_device_train_batch_size = 4 // arguments.world_size
    if is_deepspeed_zero3_enabled():
        # By default, weights as small as these are not partitioned.
        arguments.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    # Created after the arguments, which tell transformers how weights are to be kept.
    model = LlavaForConditionalGeneration.from_pretrained(base)
    if adapter is None:
        peft_model = adapt(model, init_prompts=init_prompts, **INITS[init_prompts])
    else:
        peft_model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    return Trainer(model=peft_model, args=arguments, train_dataset=make_samples(), data_collator=collate)


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    model.eval()
    return model(**without_labels(make_inputs("left"))).logits


def save_trained(model: torch.nn.Module, folder: Path, is_first: bool) -> None:
    """Saves what was trained of a model that FSDP2 has spread over processes, as docs/scale.md says."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights = get_model_state_dict(model, options=options)
    if is_first:
        model.save_pretrained(folder, state_dict=weights)


def main(base: Path, folder: Path, init_prompts: str) -> None:
    trainer = make_trainer(base, folder / "run", init_prompts)
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    results = {"losses": losses(trainer), "logits": logits(trainer.model_wrapped).tolist()}
    if "ACCELERATE_USE_FSDP" in os.environ:
        save_trained(trainer.model, folder / "trained", trainer.is_world_process_zero())
    trainer.accelerator.wait_for_everyone()

    resumed = make_trainer(base, folder / "run", init_prompts, folder / "adapter", gradient_checkpointing=True)
    for name, weight in load_file(folder / "adapter" / "adapter_model.safetensors").items():
        module, _, weight_name = name.rpartition(".")
        prompt = resumed.model.get_submodule(f"{module}.default")
        assert torch.equal(getattr(prompt, weight_name), weight), name
    # The weights of the checkpoint replace those.
    resumed.train(resume_from_checkpoint=str(folder / "run" / f"checkpoint-{SAVED_STEP}"))
    results["resumed losses"] = losses(resumed)
    if trainer.is_world_process_zero():
        (folder / "results.json").write_text(json.dumps(results))
    trainer.accelerator.wait_for_everyone()
    sys.stdout.flush()
    # An orderly end hangs now and then: models that are taken down wait for threads of gloo, which wait for Python.
    os._exit(0)


if __name__ == "__main__":
    # Where it stands is part of the output if it has to be stopped.
    faulthandler.register(signal.SIGTERM, chain=True)
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
