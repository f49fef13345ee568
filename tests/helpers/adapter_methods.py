"""transformers' own adapter methods (`add_adapter`, `load_adapter`), which can ask for a PEFT that is not released."""

import functools

import peft
import pytest
from packaging.version import Version
from peft import LoraConfig
from transformers.integrations.peft import MIN_PEFT_VERSION

from helpers.models import make_config, make_llava


WORK = Version(peft.__version__) >= Version(MIN_PEFT_VERSION)


def check_refused_like_lora():
    """What a user is told, whatever the method."""
    messages = []
    for config in (LoraConfig(target_modules=["q_proj"]), make_config()):
        model = make_llava()
        with pytest.raises(ValueError, match=f"use a version >= {MIN_PEFT_VERSION}") as error:
            model.add_adapter(config)
        messages.append(str(error.value))
        assert not hasattr(model, "peft_config")
    assert messages[0] == messages[1]


def needs_adapter_methods(test):
    """Runs a test where PEFT is new enough. Elsewhere, M2PT is to be refused in the same words as LoRA."""

    @functools.wraps(test)
    def wrapper(*args, **kwargs):
        return test(*args, **kwargs) if WORK else check_refused_like_lora()

    return wrapper
