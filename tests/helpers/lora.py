"""LoRA with updates large enough to matter."""

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer


def add_lora(model, targets, adapter_name="lora"):
    """LoRA with updates large enough to matter, the same for every model."""
    peft_model = get_peft_model(model, LoraConfig(r=4, target_modules=targets), adapter_name=adapter_name)
    randomise_lora(peft_model)
    return peft_model


def randomise_lora(model):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, module in sorted(model.named_modules(), key=lambda pair: pair[0]):
            if isinstance(module, LoraLayer):
                for parameter in (*module.lora_A.parameters(), *module.lora_B.parameters()):
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
