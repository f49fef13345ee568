"""
M2PT as a tuner of ms-swift, through its option `--external_plugins`.

    swift sft --external_plugins examples/ms_swift_plugin.py --tuner_type m2pt --model llava-hf/llava-1.5-7b-hf ...

Saved adapters are those of PEFT. `swift infer --external_plugins ... --adapters output/.../checkpoint-100` loads them.
"""

from typing import Any

from peft import PeftModel, get_peft_model
from swift.tuner_plugin import PeftTuner, tuners_map
from torch import nn

from peft_m2pt import M2PTConfig


CONFIG = M2PTConfig(num_visual_tokens=20, num_textual_tokens=10)


class M2PTTuner(PeftTuner):
    """Gives a model prompts. Saving and loading are those of `PeftTuner`."""

    @staticmethod
    def prepare_model(args: Any, model: nn.Module) -> PeftModel:
        return get_peft_model(model, CONFIG)


tuners_map["m2pt"] = M2PTTuner
