"""The rows of a bundle, which engines put in front of the tokens."""

import pytest
import torch
from helpers.bundles import (
    IN_IMAGE,
    NUM_INTERACTION,
    PREFIX,
    ROWS,
    SHARDED,
    check_rows,
    expected,
    load,
    load_base,
    logits,
    save_adapter,
    save_base,
)
from helpers.models import make_inputs
from safetensors.torch import load_file, save_file
from torch import nn

import peft_m2pt
import peft_m2pt.bundles.bundler
from peft_m2pt.saving.checkpoints import Checkpoint


class TestRows:
    @pytest.mark.parametrize(
        "kwargs", [{}, {"connector_rank": 4}, {"tune_connector": False}, {"num_interaction_tokens": 0}], ids=str
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_they_are_what_the_model_computes(self, tmp_path, output, kwargs, dtype):
        base = save_base(tmp_path / "base", dtype=dtype)
        adapter = save_adapter(base, tmp_path / "adapter", **kwargs)
        peft_m2pt.bundle(base, adapter, output)
        rows = check_rows(output, load(output))
        num_rows = 3 + kwargs.get("num_interaction_tokens", NUM_INTERACTION)
        assert [row.shape for row in rows.values()] == [(num_rows, 48)] * 3

    def test_they_are_all_that_a_decoder_needs(self, base, adapter, output):
        """Rows in front whose hidden states are overwritten in every layer, as an engine computes it."""
        peft_m2pt.bundle(base, adapter, output)
        rows = load_file(output / ROWS)
        num_rows = 3 + NUM_INTERACTION
        input_ids = make_inputs(images=False)["input_ids"]
        engine = load_base(base)
        decoder = engine.model.language_model
        for i, layer in enumerate(decoder.layers):
            own = rows[f"{PREFIX}model.language_model.layers.{i}.self_attn"]

            def overwrite(layer, args, kwargs, own=own):
                hidden_states = args[0].clone()
                hidden_states[:, :num_rows] = own
                return (hidden_states, *args[1:]), kwargs

            layer.register_forward_pre_hook(overwrite, with_kwargs=True)
        positions = torch.arange(-num_rows, input_ids.shape[1])[None]
        padded = nn.functional.pad(input_ids, (num_rows, 0), value=3)
        with torch.no_grad():
            hidden_states = decoder(input_ids=padded, position_ids=positions).last_hidden_state
            actual = engine.lm_head(hidden_states)[:, num_rows:]
            reference = load(output)(input_ids=input_ids).logits
        torch.testing.assert_close(actual, reference, rtol=0, atol=2e-4)

    @pytest.mark.parametrize(
        "kwargs, reason",
        [
            ({"num_textual_tokens": 0, "num_interaction_tokens": 0}, "no prompts in the language model"),
            ({"modules_to_save": ["input_layernorm"]}, "the adapter holds more than prompts and a connector"),
        ],
        ids=str,
    )
    def test_none_where_an_engine_would_need_more(self, base, tmp_path, output, kwargs, reason):
        peft_m2pt.bundle(base, save_adapter(base, tmp_path / "adapter", **kwargs), output)
        assert not (output / ROWS).exists()
        assert reason in (output / "README.md").read_text()

    @pytest.mark.parametrize(
        "kwargs, is_read", [({}, True), (IN_IMAGE, False), ({"num_interaction_tokens": 0}, False)]
    )
    def test_nothing_of_the_base_is_read_but_its_connector(self, tmp_path, output, monkeypatch, kwargs, is_read):
        base = save_base(tmp_path / "base", processor=True, **SHARDED)
        adapter = save_adapter(base, tmp_path / "adapter", **kwargs)
        names, read = [], Checkpoint.read
        monkeypatch.setattr(Checkpoint, "read", lambda self, name: names.append(name) or read(self, name))
        peft_m2pt.bundle(base, adapter, output)
        assert {"multi_modal_projector" in name for name in names} == ({True} if is_read else set())

    def test_names_of_weights_that_are_those_of_the_model(self, base, tmp_path, output):
        """transformers saves others, and renames them when it loads them."""
        weights = load_base(base).state_dict()
        assert not weights.keys() & load_file(base / "model.safetensors").keys()
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
        adapter = save_adapter(base, tmp_path / "adapter", tune_connector=False)
        peft_m2pt.bundle(base, adapter, output)
        model = load(output)
        assert torch.equal(logits(model), expected(base, adapter))
        check_rows(output, model)
