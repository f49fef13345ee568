"""The benchmark at dimensions at which its times mean nothing."""

import json

import pytest
import torch
from peft import get_peft_model

from benchmarks import measure
from benchmarks.__main__ import main
from benchmarks.methods import (
    Method,
    all_methods,
    base_model,
    growing_methods,
    lengthened,
    lengthened_prompts_only,
    prompts_only,
)
from benchmarks.models import DIMS, make_hollow_model, make_inputs, make_model
from benchmarks.report import list_aims, make_markdown
from benchmarks.run import GROWTH, inputs_of, interleaved
from peft_m2pt import M2PTConfig


def test_a_whole_run(tmp_path, capsys, monkeypatch):
    # Graphs are made, but not compiled.
    monkeypatch.setattr(measure, "BACKEND", "eager")
    main(["--dims", "tiny", "--threads", "1", "--repeats", "2", "--loading", "tiny", "--output", str(tmp_path)])
    [table] = tmp_path.glob("*.md")
    assert {path.suffix for path in tmp_path.iterdir()} == {".md", ".json", ".png"}
    assert table.read_text() in capsys.readouterr().out
    results = json.loads(table.with_suffix(".json").read_text())
    assert make_markdown(results) in table.read_text()

    names = [method.name for method in all_methods(DIMS["tiny"])]
    assert list(results["methods"]) == names
    for name, measured in results["methods"].items():
        assert measured["flops"] > 0
        for quantity in ("forward", "decode", *(["train"] if name != "base" else [])):
            assert len(measured[quantity]) == 2 and min(measured[quantity]) > 0
        if name != "base":
            assert 0 < measured["saved_bytes"] <= measured["peak_bytes"]
        assert f"| {name} | " in table.read_text()
    compiled = {name for name, measured in results["methods"].items() if "decode_compiled" in measured}
    assert compiled == {"base", "LoRA r=8", "M2PT (20, 10)"}
    for name, measured in results["launch_bound"].items():
        assert name in names
        assert all(len(times) == 2 and min(times) > 0 for times in measured.values())
    assert "| launch-bound | decoding | decoding four padded samples |" in table.read_text()
    assert len(results["growth"]) == len(GROWTH)
    for size in results["growth"]:
        assert list(size["methods"]) == [method.name for method in growing_methods(DIMS["tiny"])]
    for aim, value, limit in list_aims(results):
        assert (
            f"| {aim} | {value:.3f} | at most {limit:g} | {'yes' if value <= limit else '**no**'} |"
            in table.read_text()
        )
    assert {"hardware", "torch", "transformers", "peft"} <= set(results["machine"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "0"], "error: --repeats 0 measures nothing. Choose at least 1."),
        (["--device", "cuda"], "error: --device cuda: torch sees no GPU on this machine. Choose --device cpu."),
        (["--dims", "huge"], "error: argument --dims: invalid choice: 'huge'"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--output", str(tmp_path / "output")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("dims", ["tiny", "tiny-qwen"])
def test_every_method_runs_in_half_precision(dims):
    # As on a GPU.
    dims = DIMS[dims]
    base = make_model(dims, dtype=torch.bfloat16)
    for method in all_methods(dims):
        model, inputs = method.apply(base), inputs_of(method, dims, base)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        before = [parameter.detach().clone() for parameter in trained]
        if method.trains:
            measure.make_training_step(model, inputs)()
        assert any(not torch.equal(old, new) for old, new in zip(before, trained)) == method.trains, method.name
        assert measure.decoding_seconds(model, inputs, 2) > 0


def as_image_tokens(num_visual_tokens, num_textual_tokens):
    """M2PT as the paper has it: interaction prompts become image tokens."""
    config = M2PTConfig(
        num_visual_tokens=num_visual_tokens,
        num_textual_tokens=num_textual_tokens,
        num_interaction_tokens=num_visual_tokens,
        interaction_placement="image",
        connector_rank=None,
        init_prompts="xavier_uniform",
    )
    return Method("as image tokens", lambda model: get_peft_model(model, config))


@pytest.mark.parametrize(
    ("method", "longer"),
    [(prompts_only, lengthened_prompts_only), (as_image_tokens, lengthened)],
    ids=["prompts only", "with interaction prompts"],
)
def test_lengthening_computes_the_same(method, longer):
    tiny = DIMS["tiny"]
    base = make_model(tiny)
    methods = [method(4, 3), longer(4, 3)]
    models, inputs = [method.apply(base) for method in methods], inputs_of(methods[1], tiny, base)
    shapes = [sorted(p.shape for p in model.parameters() if p.requires_grad) for model in models]
    assert shapes[0] == shapes[1]
    with torch.no_grad():
        for pair in zip(*(prompts_of(model) for model in models), strict=True):
            values = torch.randn_like(pair[0])
            for prompt in pair:
                prompt.copy_(values)
    logits, expected = (model(**inputs).logits for model in models)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    logits_of_base = base(**make_inputs(tiny)).logits
    assert (logits[:, -tiny.num_text_tokens :] - logits_of_base[:, -tiny.num_text_tokens :]).abs().max() > 0.1
    labels = inputs.pop("labels")
    assert labels.shape == inputs["input_ids"].shape
    tokens, expected = (model.generate(**inputs, max_new_tokens=6, do_sample=False) for model in models)
    assert torch.equal(tokens, expected)


def prompts_of(model):
    weights = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return [p for name, p in weights if "prompt" in name or "interaction" in name]


def test_lengthening_refuses_padding():
    tiny = DIMS["tiny"]
    inputs = make_inputs(tiny)
    inputs["attention_mask"][0, :3] = 0
    with pytest.raises(ValueError, match="for batches without padding"):
        lengthened_prompts_only(4, 3).apply(make_model(tiny))(**inputs)


def test_copies_share_weights():
    base = make_model(DIMS["tiny"])
    copy = base_model().apply(base)
    assert copy is not base and copy.lm_head is not base.lm_head
    assert all(mine is other for mine, other in zip(copy.parameters(), base.parameters(), strict=True))


@pytest.mark.parametrize("dims", ["llava-1.5-7b", "qwen2.5-vl-7b"])
def test_models_of_seven_billion_parameters_take_little_memory(dims):
    model = make_hollow_model(DIMS[dims])
    assert sum(parameter.numel() for parameter in model.parameters()) > 7e9
    assert sum(parameter.untyped_storage().nbytes() for parameter in model.parameters()) < 2e8


def test_decoding_is_the_median_between_new_tokens(monkeypatch):
    # The prompt, the first new token a long time after it, and one slow token among the others.
    clock = iter([0.0, 100.0, 101.0, 102.0, 110.0])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))

    class Model:
        def generate(self, input_ids, streamer, max_new_tokens, **kwargs):
            for _ in range(1 + max_new_tokens):
                streamer.put(input_ids)

    assert measure.decoding_seconds(Model(), {"input_ids": torch.ones(1, 3)}, 3) == 1


def test_measurements_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) or len(order) for name in "abcd"}
    times = interleaved(calls, repeats=3)
    rounds = [order[i : i + 4] for i in range(0, 16, 4)]
    assert all(sorted(names) == list("abcd") for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1
    # The first round does not count.
    assert sorted(time for measured in times.values() for time in measured) == list(range(5, 17))
