"""Arguments for the trainers of TRL, and what is read of them."""

from helpers.models import VOCAB_SIZE


def arguments(folder, **kwargs):
    """On a CPU, without files. What is not said here is what TRL takes: gradient checkpointing is on."""
    values = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 3,
        "learning_rate": 0.02,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
    }
    return {**values, **kwargs}


def snapshot(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def share_of_low_tokens(completion_ids, **kwargs):
    return [sum(token < VOCAB_SIZE // 2 for token in tokens) / len(tokens) for tokens in completion_ids]
