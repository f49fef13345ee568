"""
What PEFT's own tests ask of every method, which `tests/peft_suites` asks of this one.

Each test there names the upstream tests whose behaviour it checks. What is checked elsewhere is not repeated here:

- of tests/test_config.py all, in `test_config.py` and `test_register.py`;
- of tests/testing_common.py `_test_training` and `_test_training_gradient_checkpointing`
  (`training/test_training.py`); `_test_unload_adapter` and the tests of merging, which is refused (`test_model.py`);
  `_test_save_pretrained`, `_test_inference_safetensors` and `_test_load_multiple_adapters` (`saving/test_checks.py`);
  `_test_generate` and `_test_passing_input_embeds_works` (`exactness/test_invisible.py`);
- of tests/test_custom_models.py `test_forward_float16` and its like, and `test_only_params_are_updated`
  (`training/test_training.py`); `test_save_load_roundtrip` and `test_parameters_after_loading_model`
  (`saving/test_checks.py`);
  `test_disable_adapters` (`test_model.py`);
- of the tests of batches with several adapters all, in `layers/test_mixed_batch.py`;
- of tests/test_tuners_utils.py `TestExcludedModuleNames` (`test_plan.py`).

One upstream test cannot pass: `test_in_features_out_features_exposed` is about linear layers.
"""

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
KINDS = {
    "layers": {},
    "low rank": {"connector_rank": 2},
    "frozen connector": {"tune_connector": False},
    "lm_head": {"modules_to_save": ["lm_head"]},
}
HEAD = {"modules_to_save": ["lm_head"]}


def make_llama(model_class=LlamaForCausalLM, **kwargs):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2, **SMALL, **kwargs
    )
    return model_class(config).eval()


def make_vit():
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, initializer_range=0.2, **SMALL)).eval()


def tuner_layers(model):
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def adapters_with_gradients(model):
    return {name.split(".")[-2] for name, parameter in model.named_parameters() if parameter.requires_grad}


def text_layers(peft_model):
    return peft_model.get_base_model().model.language_model.layers


def have_the_same_weights(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
