"""
M2PT as a tuner of ms-swift, through a file such as `plugin.py` and the option `--external_plugins`:

    from peft_m2pt import M2PTConfig
    from peft_m2pt.integrations.ms_swift import register

    register(M2PTConfig(num_visual_tokens=20, num_textual_tokens=10))

    swift sft --external_plugins plugin.py --tuner_type m2pt --model llava-hf/llava-1.5-7b-hf ...

Saved adapters are those of PEFT. `swift infer --external_plugins plugin.py --adapters output/.../checkpoint-100` loads
them.
"""

from __future__ import annotations

from typing import Any

from peft import PeftModel, get_peft_model
from swift.tuner_plugin import PeftTuner, tuners_map
from torch import nn

from peft_m2pt import M2PTConfig


def register(config: M2PTConfig) -> None:
    """
    Makes "m2pt" a tuner of ms-swift.

    Args:
        config ([`M2PTConfig`]):
            The config of new adapters.
    """

    class M2PTTuner(PeftTuner):
        """Gives a model prompts. Saving and loading are those of `PeftTuner`."""

        @staticmethod
        def prepare_model(args: Any, model: nn.Module) -> PeftModel:
            return get_peft_model(model, config)

    tuners_map["m2pt"] = M2PTTuner
