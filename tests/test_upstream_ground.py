"""
What the package stands on beside documented interfaces (`peft_m2pt/upstream.py`, and the methods of PEFT's tuners that
M2PT overrides). A failure here says what a release of transformers, PEFT or accelerate has changed.
"""

import inspect

import peft
import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from helpers.models import adapt, make_llava
from packaging.version import Version
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from safetensors.torch import load_file
from transformers import (
    AttentionInterface,
    AutoModelForImageTextToText,
    Cache,
    ContinuousBatchingConfig,
    DynamicCache,
    EncoderDecoderCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
    OutputRouter,
)
from transformers.generation.continuous_batching.requests import RequestState
from transformers.integrations.peft import PeftAdapterMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.utils.deprecation import deprecate_kwarg

from peft_m2pt import M2PTConfig, upstream
from peft_m2pt.attention.cached_first_tokens import UPDATES
from peft_m2pt.attention.interface import intercept_update
from peft_m2pt.attention.prompt_kv import PromptKV
from peft_m2pt.attention.prompted_layers import JOINED, can_have_prompts, join_prompts


class TestTransformers:
    def test_the_implementation_in_use(self):
        model = make_llava()
        attention = model.model.language_model.layers[0].self_attn
        for name in ("sdpa", "eager"):
            model.set_attn_implementation(name)
            assert upstream.attention_implementation(attention) == name, "where the implementation is kept has changed"

    def test_interfaces_show_the_entries_of_all_and_their_own(self):
        own = AttentionInterface()
        own["m2pt_test"] = print
        assert own.get("m2pt_test") is print, "an entry of one interface is not found in it"
        assert AttentionInterface().get("m2pt_test") is None, "an entry of one interface is seen in all"
        AttentionInterface.register("m2pt_test", len)
        try:
            assert AttentionInterface().get("m2pt_test") is len, "a registered entry is not seen in all interfaces"
            assert own.get("m2pt_test") is print, "an interface's own entry no longer comes first"
        finally:
            AttentionInterface._global_mapping.pop("m2pt_test")

    def test_caches_change_in_known_ways(self):
        """The first tokens that are kept with a cache follow all of these, or stay as they are."""
        readers = {"get_seq_length", "get_max_length", "get_max_cache_shape", "get_mask_sizes", "get_query_offset"}
        readers |= {"get_conv_state", "get_recurrent_state", "has_previous_state", "is_recording_past"}
        writers = {"update", "update_conv_state", "update_recurrent_state", "update_indexer", "early_initialization"}
        others = {"prefetch", "offload", "activate_past_recording"}
        methods = {
            name for name, value in vars(Cache).items() if inspect.isfunction(value) and not name.startswith("_")
        }
        unknown = methods - readers - writers - others - set(UPDATES)
        assert not unknown, "caches have new methods, which may bring samples elsewhere or take tokens away"
        assert set(UPDATES) <= methods, "a method of caches that moves first tokens has another name now"

    def test_recorded_attention(self):
        recorded = upstream.recorded_attention_classes(make_llava().model.language_model)
        assert LlamaAttention in recorded, "`_can_record_outputs` no longer says whose attention weights are recorded"

    def test_auto_classes(self):
        config_class = type("LlavaConfig", (LlavaConfig,), {})
        assert AutoModelForImageTextToText in upstream.AUTO_CLASSES, "the tables of the auto classes have moved"
        mapping = AutoModelForImageTextToText._model_mapping
        mapping.register(config_class, LlamaForCausalLM, exist_ok=True)
        assert mapping[config_class] is LlamaForCausalLM, "a class of the same name is no longer one of its own"
        assert mapping[LlavaConfig] is LlavaForConditionalGeneration

    def test_the_name_of_the_weights(self, tmp_path):
        make_llava().save_pretrained(tmp_path)
        config = LlavaConfig.from_pretrained(tmp_path)
        setattr(config, upstream.WEIGHTS_FIELD, "no such thing")
        with pytest.raises(ValueError, match="no such thing"):
            LlavaForConditionalGeneration.from_pretrained(tmp_path, config=config)

    def test_names_of_weights(self, tmp_path):
        model = make_llava()
        model.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "model.safetensors")
        names = upstream.names_in_model(model, saved)
        assert names.keys() == model.state_dict().keys(), "transformers renames weights in another way"
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, saved[names[name]])

    def test_adapters_beside_a_model(self, tmp_path):
        model = make_llava()
        model.save_pretrained(tmp_path)
        adapt(model).save_pretrained(tmp_path)
        seen = []
        model_class = upstream.with_loader(LlavaForConditionalGeneration, lambda *args: seen.append(args))
        loaded = model_class.from_pretrained(tmp_path, adapter_name="other")
        assert type(loaded) is LlavaForConditionalGeneration
        assert seen == [(loaded, tmp_path, "other")], "adapters are loaded in another way"
        assert not upstream.is_adapted(loaded)
        upstream.mark_as_adapted(loaded)
        assert upstream.is_adapted(loaded) and "_hf_peft_config_loaded" in inspect.getsource(PeftAdapterMixin)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_checkpointing(self, use_reentrant):
        model = make_llava().train()
        layer = model.model.language_model.layers[0]
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        assert upstream.checkpoints_reentrantly(layer) == use_reentrant, "where checkpointing is kept has changed"
        model.gradient_checkpointing_disable()
        assert not upstream.checkpoints_reentrantly(layer)

    def test_what_layers_see(self):
        common = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        window = MistralForCausalLM(MistralConfig(**common, sliding_window=7)).model.layers[0].self_attn
        assert upstream.local_reach(window) == (7, None), "the sliding window is kept elsewhere"
        text = Gemma3TextConfig(**common, sliding_window=7, layer_types=["sliding_attention", "full_attention"])
        layers = Gemma3ForCausalLM(text).model.layers
        reaches = [upstream.local_reach(layer.self_attn) for layer in layers]
        assert reaches == [(7, None), (None, None)], "types of layers are kept elsewhere"
        chunks = Llama4TextConfig(**common, head_dim=8, attention_chunk_size=7, no_rope_layers=[1, 0])
        reaches = [upstream.local_reach(layer.self_attn) for layer in Llama4ForCausalLM(chunks).model.layers]
        assert reaches == [(None, 7), (None, None)], "the length of chunks is kept elsewhere"

    def test_caches(self):
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        assert isinstance(cache.self_attention_cache, DynamicCache), "a cache of two is made in another way"
        cache = DynamicCache(config=MistralConfig(num_hidden_layers=1, sliding_window=4))
        cache.update(torch.ones(1, 1, 6, 2), torch.ones(1, 1, 6, 2), 0)
        assert cache.get_seq_length(0) == 6, "caches count their tokens in another way"
        assert cache.get_mask_sizes(2, 0) == (5, 3), "caches say in another way which keys a mask has columns for"

    def test_needed_peft(self):
        model, needed = make_llava(), upstream.min_peft_version()
        assert needed is not None, "the version of PEFT that is asked for is kept elsewhere"
        try:
            model.add_adapter(LoraConfig(target_modules=["q_proj"]))
            is_taken = True
        except ValueError as error:
            assert needed in str(error), "the version of PEFT that is asked for is kept elsewhere"
            is_taken = False
        assert is_taken == (Version(peft.__version__) >= Version(needed))

    def test_deprecated_arguments(self):
        @deprecate_kwarg("before", "99.0", new_name="after")
        def function(after=None):
            return after

        assert upstream.renamed_arguments(function) == {"before": "after"}, (
            "`deprecate_kwarg` keeps names in another way"
        )

    def test_models_on_meta(self):
        config = LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4)
        model = upstream.make_on_meta(config)
        assert all(weight.is_meta for weight in model.parameters())
        config.architectures = ["LlamaForCausalLM"]
        assert type(upstream.make_on_meta(config)) is LlamaForCausalLM
        llava = make_llava().config
        assert type(upstream.make_on_meta(llava)).__name__ == "LlavaForConditionalGeneration"

        class Unknown(LlamaConfig):
            model_type = "unknown"

        with pytest.raises(ValueError, match="has no model for Unknown"):
            upstream.make_on_meta(Unknown())

    def test_continuous_batching(self):
        method = getattr(LlamaForCausalLM, upstream.CONTINUOUS_BATCHING, None)
        assert method is not None, "continuous batching has another entrance"
        source = inspect.getsource(LlamaForCausalLM.continuous_batching_context_manager)
        assert f"self.{upstream.CONTINUOUS_BATCHING}(" in source, "the context manager has another entrance"
        source = inspect.getsource(LlamaForCausalLM.generate_batch)
        assert "self.continuous_batching_context_manager(" in source, "`generate_batch` has another entrance"


@pytest.mark.skipif(not upstream.has_known_continuous_batching(), reason="continuous batching is refused")
class TestContinuousBatching:
    def test_the_worker(self):
        loop = inspect.signature(getattr(ContinuousBatchingManager, upstream.BATCHING_LOOP)).parameters
        assert list(loop)[:2] == ["self", "batch_processor"], "the loop of the worker is another"
        source = inspect.getsource(ContinuousBatchingManager)
        methods = (upstream.BATCHING_LOOP, upstream.BATCHING_PROCESSOR, upstream.BATCHING_STEP)
        assert all(f"self.{name}(" in source for name in methods), "the worker goes other ways"
        assert "self.input_queue.put(" in source, "requests come in another way"
        assert {"fail_all_requests", "reset", "has_pending_requests"} <= set(dir(ContinuousBatchProcessor))
        assert hasattr(OutputRouter, "fail_and_deliver") and hasattr(PagedAttentionCache, "evict_cached_blocks")

    def test_a_cache_forgets_what_requests_could_share(self):
        options = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=16, page_size=8)
        model = make_llama()
        manager = model.init_continuous_batching(GenerationConfig(max_new_tokens=2), options)
        processor = manager._create_batch_processor()
        cache = processor.cache
        state = RequestState(request_id="first", initial_tokens=list(range(20)))
        assert cache.can_store_request_tokens(state, 20)
        cache.mark_complete_blocks(state, {"full_attention": 2})
        cache.free_blocks("first")
        assert cache.search_prefix_match("second", list(range(20))) == 16, "texts are shared in another way"
        cache.free_blocks("second")
        cache.evict_cached_blocks()
        assert cache.search_prefix_match("third", list(range(20))) == 0, "shared texts are kept elsewhere"

    def test_what_attention_modules_are_told(self):
        """Also that it is the modules that bring keys into the cache, or their attention functions: one of both."""
        model = make_llama()
        told, keys = [], []

        def note(module, args, kwargs):
            assert upstream.is_paged(kwargs["cache"]), "the cache has another name"
            boundaries, before, _ = upstream.paged_lengths(kwargs)
            told.append((boundaries.tolist(), before.tolist(), kwargs["position_ids"].tolist()))

        def attend(module, query, key, value, attention_mask, **kwargs):
            key, value = upstream.update_paged_cache(module, key, value, kwargs)
            assert "cache" not in kwargs, "a cache is updated twice"
            keys.append((key.shape[2], kwargs["cu_seq_lens_k"].tolist(), kwargs["max_length_k"]))
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

        interface = AttentionInterface()
        previous = interface["sdpa"]
        AttentionInterface.register("sdpa", attend)
        handle = model.model.layers[0].self_attn.register_forward_pre_hook(note, with_kwargs=True)
        try:
            outputs = model.generate_batch(
                [[5, 6, 7], [8, 9]],
                generation_config=GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=-1),
                continuous_batching_config=ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=16, page_size=8),
            )
        finally:
            AttentionInterface.register("sdpa", previous)
            handle.remove()
        assert [output.error for output in outputs.values()] == [None, None]
        # Texts are sorted, the last one first.
        assert told == [([0, 2, 5], [0, 0], [[0, 1, 0, 1, 2]]), ([0, 1, 2], [2, 3], [[2, 3]])]
        assert keys == [(5, [0, 2, 5], 3), (7, [0, 3, 7], 4)], "functions are told other lengths"


@pytest.mark.parametrize("window", [None, 5])
def test_what_layers_of_dynamic_caches_keep(window):
    """With something in front of what `update` returns, a layer has to keep what it keeps without."""

    def make_layer():
        return DynamicLayer() if window is None else DynamicSlidingWindowLayer(sliding_window=window)

    upstream.intercept_updates(intercept_update)
    layer, expected = make_layer(), make_layer()
    prompts = PromptKV(*torch.randn(2, 1, 3, 2, 4))
    assert not can_have_prompts(layer), "layers are initialized when they are made"
    for of_layer in (layer, expected):
        torch.manual_seed(0)
        of_layer.update(*torch.randn(2, 2, 3, 3, 4))
    for step in range(6):
        assert can_have_prompts(layer)
        new = torch.randn(2, 2, 3, 1, 4)
        if step == 3:
            before = vars(layer).copy()
            join_prompts(layer, prompts, *new)
            layer.__dict__ = before
            assert layer.get_seq_length() == expected.get_seq_length(), "a layer counts its tokens in another way"
        joined, returned = join_prompts(layer, prompts, *new), expected.update(*new)
        for tensor, other, rows in zip(joined, returned, (prompts.key, prompts.value)):
            assert torch.equal(tensor[:, :, 2:], other), "update returns something else"
            assert torch.equal(tensor[:, :, :2], rows.expand(2, -1, -1, -1))
        kept = (layer.keys, layer.values)
        assert all(map(torch.equal, kept, (expected.keys, expected.values))), "update keeps something else"
        assert layer.get_seq_length() == expected.get_seq_length()
        assert layer.get_mask_sizes(1) == expected.get_mask_sizes(1)
        assert vars(layer).keys() - {JOINED} == vars(expected).keys(), "update sets further attributes"


def make_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    return LlamaForCausalLM(config).eval()


OVERRIDDEN = {
    BaseTuner: {
        "_check_merge_allowed": [],
        "_check_target_module_exists": ["peft_config", "key"],
        "_create_and_replace": ["peft_config", "adapter_name", "target", "target_name", "parent", "current_key"],
        "_get_adapter_state_dict": ["model", "config", "adapter_name", "state_dict", "unwanted_adapter_names"],
        "_prepare_adapter_config": ["peft_config", "model_config"],
        "_prepare_model": ["peft_config", "model"],
        "_remap_adapter_state_dict_for_load": ["model", "config", "adapter_name", "state_dict"],
        "_replace_module": ["parent", "child_name", "new_module", "child"],
        "_unload_and_optionally_merge": ["merge"],
        "inject_adapter": ["model", "adapter_name", "autocast_adapter_dtype", "low_cpu_mem_usage", "state_dict"],
    },
    BaseTunerLayer: {
        "_get_available_adapters": [],
        "_move_adapter_to_device_of_base_layer": ["adapter_name"],
        "delete_adapter": ["adapter_name"],
    },
}


class TestPeft:
    @pytest.mark.parametrize("owner, name", [(owner, name) for owner in OVERRIDDEN for name in OVERRIDDEN[owner]])
    def test_overridden_methods(self, owner, name):
        method = getattr(owner, name, None)
        assert method is not None, f"PEFT's {owner.__name__} has no {name} any more, which M2PT overrides or calls"
        names = [parameter for parameter in inspect.signature(method).parameters if parameter not in ("self", "cls")]
        expected = OVERRIDDEN[owner][name]
        assert names[: len(expected)] == expected, f"{owner.__name__}.{name} takes other arguments: {names}"

    def test_the_sign_that_weights_are_about_to_be_loaded(self, tmp_path, monkeypatch):
        adapt(make_llava()).save_pretrained(tmp_path)
        signs = []
        set_attribute = M2PTConfig.__setattr__

        def note(config, name, value):
            signs.append(name)
            set_attribute(config, name, value)

        config = M2PTConfig.from_pretrained(tmp_path)
        monkeypatch.setattr(M2PTConfig, "__setattr__", note)
        PeftModel.from_pretrained(make_llava(), tmp_path, config=config)
        assert signs and signs[0] == "inference_mode", f"PeftModel.from_pretrained first sets {signs[:1]} on a config"

    def test_arguments_of_the_hub(self):
        hub_arguments, *_ = PeftConfig._split_kwargs({"revision": "v2", "inference_mode": True})
        assert hub_arguments == {"revision": "v2"}, "PeftConfig._split_kwargs sorts arguments in another way"


def test_offloaded_weights():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert upstream.offloaded_to(model[0]) is None
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert upstream.offloaded_to(model[0]) == torch.device("cpu"), "accelerate's hooks keep their device elsewhere"
    model = dispatch_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), {"": "cpu"}, force_hooks=True)
    assert upstream.offloaded_to(model[0]) is None
    cpu_offload(model, execution_device="cpu")
    assert upstream.offloaded_to(model[0]) == torch.device("cpu"), "accelerate puts hooks together in another way"
