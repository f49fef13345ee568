"""
Continuous batching gives the tokens of `generate`, whatever requests share a batch, and what it cannot give is refused
before a worker starts, or for the requests that it concerns.
"""

import contextlib
import copy
import pickle
import time

import pytest
import torch
from helpers.attention_kernels import stand_ins
from helpers.models import IMAGE_TOKEN, SLIDING_WINDOW, VOCAB_SIZE, adapt, make_config, make_llava, randomise
from transformers import (
    CompileConfig,
    ContinuousBatchingConfig,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from peft_m2pt import UnsupportedModelError, upstream
from peft_m2pt.hooks import continuous_batching


supported = pytest.mark.skipif(
    not upstream.has_known_continuous_batching(), reason=f"needs transformers {upstream.LOWEST_CONTINUOUS_BATCHING}"
)
NUM_TOKENS = 5
OPTIONS = GenerationConfig(max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=2, pad_token_id=0)
# The longest request is read in two parts, together with others that are being answered. The third one begins as the
# second does, with more tokens than there are in a page.
TOKENS = torch.randint(3, IMAGE_TOKEN, (28,), generator=torch.Generator().manual_seed(1)).tolist()
REQUESTS = [TOKENS[:3], TOKENS, [*TOKENS[:11], 7, 8], TOKENS[20:21], TOKENS[9:18]]


def options_of_batching(**kwargs) -> ContinuousBatchingConfig:
    page = "page_size" if hasattr(ContinuousBatchingConfig, "page_size") else "block_size"
    return ContinuousBatchingConfig(**{"num_blocks": 64, "max_batch_tokens": 16, page: 8, **kwargs})


def make_text_model(config_class, model_class, attn, **kwargs) -> PreTrainedModel:
    config = config_class(
        hidden_size=48,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=512,
        initializer_range=0.2,
        pad_token_id=0,
        **kwargs,
    )
    config._attn_implementation = attn
    torch.manual_seed(0)
    return model_class(config).eval()


def make_llama(attn: str = "sdpa") -> PreTrainedModel:
    return make_text_model(LlamaConfig, LlamaForCausalLM, attn)


MODELS = {
    "llama": make_llama,
    "qwen2": lambda attn: make_text_model(Qwen2Config, Qwen2ForCausalLM, attn),
    "qwen3": lambda attn: make_text_model(Qwen3Config, Qwen3ForCausalLM, attn),
    "mistral": lambda attn: make_text_model(MistralConfig, MistralForCausalLM, attn, sliding_window=SLIDING_WINDOW),
    "gemma3": lambda attn: make_text_model(
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        attn,
        sliding_window=SLIDING_WINDOW,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "llava": lambda attn: make_llava(attn=attn),
}
TEXT_ONLY = {"num_visual_tokens": 0, "num_interaction_tokens": 0}


def adapt_llama(attn: str = "sdpa", **kwargs):
    return adapt(make_llama(attn), **TEXT_ONLY, **kwargs)


def add_adapter(model, name: str) -> None:
    model.add_adapter(name, make_config(**TEXT_ONLY))
    randomise(model.base_model.model.model.layers[0].self_attn.m2pt_prompt[name], seed=9)


def generate_batch(model, requests=REQUESTS, **kwargs) -> list:
    outputs = model.generate_batch(
        requests, generation_config=OPTIONS, continuous_batching_config=options_of_batching(**kwargs)
    )
    return [output.error or output.generated_tokens for output in outputs.values()]


def generate(model, request: list[int]) -> list[int]:
    return model.generate(torch.tensor([request]), generation_config=OPTIONS)[0, len(request) :].tolist()


def generate_each(model, requests=REQUESTS) -> list[list[int]]:
    return [generate(model, request) for request in requests]


@contextlib.contextmanager
def manager_of(model, **kwargs):
    manager = model.init_continuous_batching(
        generation_config=OPTIONS, continuous_batching_config=options_of_batching(**kwargs)
    )
    manager.start()
    try:
        yield manager
    finally:
        manager.stop(block=True, hard_stop=True)


def wait_for(manager, request_id: str):
    """What comes of a request in the end."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        output = manager.get_result(request_id, timeout=1)
        if output is not None and (output.error or output.is_finished()):
            return output
    raise TimeoutError(request_id)


def answer(manager, request: list[int]) -> list[int]:
    output = wait_for(manager, manager.add_request(request))
    assert output.error is None, output.error
    return output.generated_tokens


def start_long_request(manager) -> str:
    """Adds a request that goes on for long, and waits for its first token."""
    request = manager.add_request(REQUESTS[0], max_new_tokens=400, eos_token_id=-1, streaming=True)
    while manager.get_result(request, timeout=1) is None:
        assert manager.is_running()
    return request


@supported
@pytest.mark.parametrize(
    "name, attn",
    [
        *((name, "sdpa") for name in MODELS),
        *((name, "eager") for name in ("llama", "gemma3")),
        *((name, "flash_attention_2") for name in ("llama", "mistral", "gemma3")),
    ],
)
def test_the_tokens_of_generate(name, attn):
    with stand_ins() if attn == "flash_attention_2" else contextlib.nullcontext():
        model = MODELS[name](attn)
        of_base = generate_each(model)
        model = adapt(model, **({} if name == "llava" else TEXT_ONLY))
        expected = generate_each(model)
        assert expected != of_base
        assert generate_batch(model, auto_switch_to_flash=False) == expected
        if attn == "sdpa":
            with model.disable_adapter():
                assert generate_batch(model) == of_base
    assert model.get_base_model().config._attn_implementation == attn


@supported
def test_layers_without_prompts_and_several_adapters():
    model = adapt_llama(textual_layers=[1])
    add_adapter(model, "other")
    model.base_model.set_adapter(["default", "other"])
    assert generate_batch(model) == generate_each(model)


@supported
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(duplicate):
    original = adapt_llama()
    model = duplicate(original)
    expected = generate_each(model)
    with original.disable_adapter():
        assert generate_batch(model) == expected


@supported
def test_requests_that_come_while_others_run():
    model = adapt_llama()
    expected = generate_each(model)
    with manager_of(model) as manager:
        start_long_request(manager)
        assert [answer(manager, request) for request in REQUESTS[1:]] == expected[1:]


@supported
def test_other_adapters_and_weights_between_requests():
    """What requests share with former ones was computed with other prompts."""
    model = adapt_llama()
    add_adapter(model, "other")
    answers = []
    with manager_of(model) as manager:
        for name in ("default", "other", "default"):
            model.set_adapter(name)
            answers.append((answer(manager, TOKENS), generate(model, TOKENS)))
        with model.disable_adapter():
            answers.append((answer(manager, TOKENS), generate(model, TOKENS)))
        randomise(model, seed=5)
        answers.append((answer(manager, TOKENS), generate(model, TOKENS)))
    assert all(given == expected for given, expected in answers)
    assert len({tuple(given) for given, _ in answers}) == 4


@supported
def test_an_adapter_switched_while_requests_run():
    model = adapt_llama()
    add_adapter(model, "other")
    with manager_of(model) as manager:
        request = start_long_request(manager)
        model.set_adapter("other")
        assert "adapter in use, its weights or those of the model were changed" in wait_for(manager, request).error
        assert answer(manager, TOKENS) == generate(model, TOKENS)
        request = start_long_request(manager)
        with model.disable_adapter():
            assert "adapter in use, its weights or those of the model" in wait_for(manager, request).error
            assert answer(manager, TOKENS) == generate(model, TOKENS)


@supported
def test_an_adapter_switched_between_two_layers():
    """In the first batch, no layer can compare its prompts with those before."""
    model = adapt_llama()
    add_adapter(model, "other")
    layer = model.base_model.model.model.layers[0]
    with manager_of(model) as manager:
        handle = layer.register_forward_hook(lambda *args: model.set_adapter("other"))
        error = wait_for(manager, manager.add_request(REQUESTS[0], max_new_tokens=1)).error
        handle.remove()
        assert "stand in front of them at 'model.layers.0.self_attn'" in error
        assert answer(manager, TOKENS) == generate(model, TOKENS)


@supported
def test_images_are_refused_for_their_request():
    model = adapt(make_llava())
    image, *others = generate_batch(model, [[5, IMAGE_TOKEN, 6], *REQUESTS])
    assert f"has the image token {IMAGE_TOKEN}, but continuous batching takes no images" in image
    assert others == generate_each(model)
    with model.disable_adapter():
        assert isinstance(generate_batch(model, [[5, IMAGE_TOKEN, 6]])[0], list)


@supported
def test_requests_that_do_not_start_at_0():
    model = adapt_llama()

    def move(module, args, kwargs):
        return args, {**kwargs, "position_ids": kwargs["position_ids"] + 1}

    with manager_of(model) as manager:
        handle = model.base_model.model.model.register_forward_pre_hook(move, with_kwargs=True)
        error = wait_for(manager, manager.add_request(TOKENS)).error
        handle.remove()
        assert "'model.layers.0.self_attn'" in error and "whose positions do not start at 0" in error
        assert answer(manager, TOKENS) == generate(model, TOKENS)


@supported
def test_the_decode_fast_path_is_refused_in_a_call():
    attention = adapt_llama().base_model.model.model.layers[0].self_attn
    cache = object.__new__(upstream.PagedAttentionCache)
    arguments = {"position_embeddings": (torch.ones(1, 2, 12), torch.zeros(1, 2, 12)), "attention_mask": None}
    with pytest.raises(
        UnsupportedModelError, match="older than its prompts, or was not made by init_continuous_batch"
    ):
        attention(torch.randn(1, 2, 48), **arguments, cache=cache)
    cache.m2pt_prompts = {}
    with pytest.raises(UnsupportedModelError, match="got a block_table.*Set max_blocks_per_request=0"):
        attention(torch.randn(1, 2, 48), **arguments, cache=cache, block_table=torch.zeros(1, 2, 1))


@supported
@pytest.mark.parametrize(
    "name, value",
    [
        ("use_cuda_graph", True),
        ("use_cuda_graph", (False, True)),
        ("varlen_compile_config", CompileConfig()),
        ("decode_compile_config", CompileConfig()),
        ("default_compile_level", 1),
        ("max_blocks_per_request", 8),
        ("use_async_batching", True),
    ],
)
def test_options_that_are_refused(name, value):
    model = adapt_llama(attn="eager")
    with pytest.raises(
        UnsupportedModelError, match=rf"ContinuousBatchingConfig has {name}=.* 'model.layers.0.self_at"
    ):
        generate_batch(model, [[5, 6, 7]], **{name: value})
    assert model.get_base_model().config._attn_implementation == "eager"


@supported
def test_options_that_nobody_chose():
    model = adapt_llama()
    given = options_of_batching(use_cuda_graph=False)
    manager = model.init_continuous_batching(generation_config=OPTIONS, continuous_batching_config=given)
    options = manager.continuous_batching_config
    assert options.use_cuda_graph == (False, False) and options.use_async_batching is False
    assert options.max_blocks_per_request == 0 and given.max_blocks_per_request is None


@supported
def test_managers_that_are_older_than_the_prompts():
    model = make_llama()
    old = model.init_continuous_batching(generation_config=OPTIONS, continuous_batching_config=options_of_batching())
    old.start()
    try:
        model = adapt(model, **TEXT_ONLY)
        output = wait_for(old, old.add_request(TOKENS))
        assert "older than its prompts" in output.error
    finally:
        old.stop(block=True, keep_for_next_session=True)
    with pytest.raises(
        UnsupportedModelError, match=r"Call model.destroy_cached_continuous_batching_manager\(\) first"
    ):
        generate_batch(model)
    model.destroy_cached_continuous_batching_manager()
    assert generate_batch(model, REQUESTS[:2]) == generate_each(model, REQUESTS[:2])


@supported
def test_a_manager_that_is_kept():
    model = adapt_llama()
    add_adapter(model, "other")
    for name in ("default", "other"):
        model.set_adapter(name)
        outputs = model.generate_batch(
            REQUESTS[:3],
            generation_config=OPTIONS,
            continuous_batching_config=options_of_batching(),
            persistent_manager=True,
        )
        assert [output.generated_tokens for output in outputs.values()] == generate_each(model, REQUESTS[:3])


@supported
def test_paged_eager_without_a_paged_cache():
    """transformers would attend without a mask."""
    model = adapt_llama(attn="eager")
    with manager_of(model) as manager:
        answer(manager, TOKENS)
        with pytest.raises(UnsupportedModelError, match=r"attn_implementation='paged\|eager'"):
            generate(model, TOKENS)


def test_works_again_without_prompts():
    base = make_llama()
    expected = generate_each(base, REQUESTS[:1])
    model = adapt(base, **TEXT_ONLY)
    with model.disable_adapter():
        assert generate_batch(model, REQUESTS[:1]) == expected
    base = model.unload()
    assert "init_continuous_batching" not in vars(base)
    assert generate_batch(base, REQUESTS[:1]) == expected


def test_not_touched_with_visual_prompts_alone():
    model = adapt(make_llava(), num_textual_tokens=0, num_interaction_tokens=0, tune_connector=False)
    assert "init_continuous_batching" not in vars(model.get_base_model())


@pytest.mark.parametrize("unwrap", [lambda model: model, lambda model: model.get_base_model()])
def test_refused_by_every_entrance_of_older_versions(unwrap, monkeypatch):
    """What `use_transformers_continuous_batching=True` of TRL and `transformers serve` start with."""
    monkeypatch.setattr(upstream, "LOWEST_CONTINUOUS_BATCHING", "99.1")
    monkeypatch.setattr(continuous_batching, "LOWEST_CONTINUOUS_BATCHING", "99.1")
    model = unwrap(adapt_llama(textual_layers=[1]))
    refused = (
        r"in use at 'model.layers.1.self_attn', for which continuous batching needs transformers 99.1.*generate\("
    )
    with pytest.raises(UnsupportedModelError, match=refused):
        generate_batch(model)
    with pytest.raises(UnsupportedModelError, match=refused):
        model.init_continuous_batching(generation_config=OPTIONS)
    with pytest.raises(UnsupportedModelError, match=refused):
        with model.continuous_batching_context_manager(generation_config=OPTIONS):
            raise AssertionError("a manager was made")
