"""The table that `describe` prints."""

import re

from helpers.models import adapt, make_config, make_inputs, make_llava, trained_by


def rows(peft_model):
    lines = peft_model.base_model.describe().splitlines()
    return [re.split(r" {2,}", line.strip()) for line in (lines[0], *lines[2:])]


def test_table():
    peft_model = adapt(make_llava(), textual_layers=[0, 2])
    visual, textual, interaction = 3 * 4 * 32, 2 * 3 * 48, 2 * 2 * 32
    connector = 32 * 48 + 48 + 48 * 48 + 48
    total = sum(parameter.numel() for parameter in peft_model.parameters())

    def amounts(count):
        return [f"{count:,}", f"{count / total:.4%}", "-"]

    assert rows(peft_model) == [
        ["adapter", "part", "module", "layers", "tokens", "parameters", "share", "gradient norm"],
        ["default*", "visual", "model.vision_tower.encoder.layers.*.self_attn", "0-2", "4", *amounts(visual)],
        ["default*", "connector", "model.multi_modal_projector", *amounts(connector)],
        ["default*", "textual", "model.language_model.layers.*.self_attn", "0, 2", "3", *amounts(textual)],
        ["default*", "interaction", "model.language_model.layers.*.self_attn", "0, 2", "2", *amounts(interaction)],
        ["total", *amounts(visual + textual + interaction + connector)],
    ]


def test_gradient_norms():
    peft_model = adapt(make_llava())
    peft_model(**make_inputs()).loss.backward()
    parts = ("vision_tower", "m2pt_connector", "language_model.*m2pt_prompt", "m2pt_interaction", "m2pt_")
    for row, part in zip(rows(peft_model)[1:], parts):
        gradients = [p.grad.norm() ** 2 for name, p in trained_by(peft_model).items() if re.search(part, name)]
        assert row[-1] == f"{sum(gradients).sqrt().item():.3g}"


def test_all_that_is_trained_and_all_adapters():
    peft_model = adapt(make_llava(), modules_to_save=["lm_head"])
    peft_model.add_adapter("other", make_config(num_visual_tokens=0, num_interaction_tokens=0, connector_rank=2))
    table = rows(peft_model)
    assert [row[:3] for row in table[1:-1]] == [
        ["default*", "visual", "model.vision_tower.encoder.layers.*.self_attn"],
        ["default*", "connector", "model.multi_modal_projector"],
        ["other", "connector", "model.multi_modal_projector"],
        ["default*", "textual", "model.language_model.layers.*.self_attn"],
        ["other", "textual", "model.language_model.layers.*.self_attn"],
        ["default*", "interaction", "model.language_model.layers.*.self_attn"],
        ["default*", "modules_to_save", "lm_head"],
    ]
    assert f"{2 * (32 + 48) + 2 * (48 + 48):,}" in table[3]
    assert f"{97 * 48:,}" in table[7]


def test_print_trainable_parameters(capsys):
    adapt(make_llava(), num_interaction_tokens=0, tune_connector=False).print_trainable_parameters()
    assert f"trainable params: {3 * 4 * 32 + 3 * 3 * 48:,d} ||" in capsys.readouterr().out
