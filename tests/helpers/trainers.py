"""Trainers of transformers for the tiny LLaVA."""

from datasets import Dataset
from transformers import Trainer, TrainingArguments

from helpers.models import make_inputs


def make_trainer(peft_model, folder, optimizers=(None, None), optimizer_cls_and_kwargs=None, **kwargs):
    batch = make_inputs("right")
    dataset = Dataset.from_list([{name: value[i].tolist() for name, value in batch.items()} for i in range(2)] * 4)
    arguments = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.05,
        "report_to": "none",
        "save_strategy": "steps",
        "save_steps": 3,
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        **kwargs,
    }
    return Trainer(
        model=peft_model,
        args=TrainingArguments(output_dir=str(folder), **arguments),
        train_dataset=dataset.with_format("torch"),
        optimizers=optimizers,
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
    )
