"""The README of a bundle: how to load and serve it, and what programs without this package do with it."""

from __future__ import annotations

from ..config import M2PTConfig


TEXT = """\
# {base} with an M2PT adapter

The base model `{base}` and the [M2PT](https://arxiv.org/abs/2409.15657) adapter `{adapter}`, in one folder that
can be used like a model name. Made by `peft-m2pt bundle`; needs `pip install peft-m2pt`.

```py
import peft_m2pt  # tells transformers what this folder is
from transformers import AutoProcessor, {loader}

model = {loader}.from_pretrained(".")  # this folder; same outputs as a PeftModel
processor = AutoProcessor.from_pretrained(".")
```

## Serving

    peft-m2pt serve FOLDER     # pip install "transformers[serving]"
    vllm serve FOLDER          # for the models that it was tried with: docs/serving.md of peft-m2pt
    python -m peft_m2pt run lm_eval --model hf-multimodal --model_args pretrained=FOLDER --tasks ...

`python -m peft_m2pt run` runs any program that loads models with the auto classes of transformers.

## Without peft_m2pt

The folder must not be taken for the base model. Without the package,

- the auto classes of transformers, `pipeline`, and servers that use them fail on the unknown model type `peft_m2pt`;
- a model class used directly, such as `LlavaForConditionalGeneration.from_pretrained`, fails with the notice in
  `transformers_weights`: with or without the package, only the auto classes load this folder;
- engines with their own model code fail on the unknown architecture `PeftM2PTBundle` or, if that is overridden, on
  unexpected weights.

This does not cover programs that read only the tensors that they need, as converters of checkpoints may, or that are
given another config: without PEFT, `from_pretrained(FOLDER, config=...)` of a model class used directly, with the
config of the base model, loads the base model alone.

## Files

| file | holds |
|---|---|
| `config.json` | that of the base model, marked as a bundle; original values are in `peft_m2pt_...` |
| `adapter_config.json`, `adapter_model.safetensors` | the adapter |
{rows}
| all other files | those of the base model: {place} |
"""


ROWS = (
    "| `m2pt_textual_rows.safetensors` | for engines: the rows [P_i ; f_in(V_i)] of each layer of the language model, "
    "by the path of its attention |"
)


NO_ROWS = (
    "| no `m2pt_textual_rows.safetensors` | {reason}, so engines that take prompts as hidden states cannot run this "
    "model |"
)


def describe_bundle(base: str, adapter: str, loader: str, config: M2PTConfig, has_rows: bool, is_copy: bool) -> str:
    """
    Writes the README of a bundle.

    Args:
        base (`str`):
            Name of the base model.
        adapter (`str`):
            Name of the adapter.
        loader (`str`):
            The class of transformers that loads it.
        config ([`M2PTConfig`]):
            The configuration of the adapter.
        has_rows (`bool`):
            Whether the prompt rows of the language model are in the bundle.
        is_copy (`bool`):
            Whether the files of the base model are copied and not linked.

    Returns:
        `str`
    """
    if config.num_textual_tokens == 0:
        reason = "there are no prompts in the language model"
    else:
        reason = "the adapter holds more than prompts and a connector"
    return TEXT.format(
        base=base,
        adapter=adapter,
        loader=loader,
        rows=ROWS if has_rows else NO_ROWS.format(reason=reason),
        place="copies" if is_copy else "links, which break if it is moved or deleted (`--copy` makes copies)",
    )
