"""The table that `describe` prints."""

import re

from models import adapt, make_inputs, make_llava, prompts_of

from peft_m2pt import M2PTConfig


def rows(peft_model):
    lines = peft_model.base_model.describe().splitlines()
    return [re.split(r" {2,}", line.strip()) for line in (lines[0], *lines[2:])]


def test_table():
    peft_model = adapt(make_llava(), textual_layers=[0, 2])
    visual, textual = 3 * 4 * 32, 2 * 3 * 48
    total = sum(parameter.numel() for parameter in peft_model.parameters())

    def amounts(count):
        return [f"{count:,}", f"{count / total:.4%}", "-"]

    assert rows(peft_model) == [
        ["adapter", "part", "module", "layers", "tokens", "parameters", "share", "gradient norm"],
        ["default*", "visual", "model.vision_tower.encoder.layers.*.self_attn", "0-2", "4", *amounts(visual)],
        ["default*", "textual", "model.language_model.layers.*.self_attn", "0, 2", "3", *amounts(textual)],
        ["total", *amounts(visual + textual)],
    ]


def test_gradient_norms():
    peft_model = adapt(make_llava())
    peft_model(**make_inputs()).loss.backward()
    for row, part in zip(rows(peft_model)[1:], ("vision_tower", "language_model", "")):
        gradients = [p.grad.norm() ** 2 for name, p in prompts_of(peft_model).items() if part in name]
        assert row[-1] == f"{sum(gradients).sqrt().item():.3g}"


def test_all_that_is_trained_and_all_adapters():
    peft_model = adapt(make_llava(), modules_to_save=["lm_head"])
    peft_model.add_adapter("other", M2PTConfig(num_visual_tokens=0, num_textual_tokens=1))
    table = rows(peft_model)
    assert [row[:3] for row in table[1:-1]] == [
        ["default*", "visual", "model.vision_tower.encoder.layers.*.self_attn"],
        ["default*", "textual", "model.language_model.layers.*.self_attn"],
        ["other", "textual", "model.language_model.layers.*.self_attn"],
        ["default*", "modules_to_save", "lm_head"],
    ]
    assert f"{97 * 48:,}" in table[4]


def test_print_trainable_parameters(capsys):
    adapt(make_llava()).print_trainable_parameters()
    assert f"trainable params: {3 * 4 * 32 + 3 * 3 * 48:,d} ||" in capsys.readouterr().out
