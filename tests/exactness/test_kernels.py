"""Flash and flex attention: what they give with prompts is what "sdpa" gives, run by stand-ins for their kernels."""

import sys

import pytest
import torch
import transformers
from families import FAMILIES
from families.checks import Tuned
from helpers.attention_kernels import KERNELS, calls, stand_ins
from helpers.models import SLIDING_WINDOW, adapt, make_inputs, make_llava, trained_by, without_labels
from packaging.version import Version
from transformers import AttentionInterface
from transformers.integrations.flash_attention import flash_attention_forward

from peft_m2pt import UnsupportedModelError


@pytest.fixture(autouse=True)
def kernels():
    with stand_ins():
        yield


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("vision, text", [("clip", "llama"), ("siglip", "mistral"), ("clip", "qwen2")])
@pytest.mark.parametrize("attn", [*KERNELS, "flash_attention_3"])
class TestGivesWhatSdpaGives:
    @pytest.mark.parametrize("padding", ["none", "no mask", "left", "right"])
    def test_training(self, attn, vision, text, padding):
        inputs = make_inputs(padding)
        of_sdpa, model = (adapt(make_llava(vision, text, name)) for name in ("sdpa", attn))
        loss, expected_loss = model(**inputs).loss, of_sdpa(**inputs).loss
        assert_close(loss, expected_loss)
        loss.backward()
        expected_loss.backward()
        expected = trained_by(of_sdpa)
        for name, parameter in trained_by(model).items():
            assert_close(parameter.grad, expected[name].grad)
        assert any(call.startswith(attn[:5]) for call in calls)

    @pytest.mark.parametrize("padding", ["no mask", "left"])
    @torch.no_grad()
    def test_generation(self, attn, vision, text, padding):
        inputs = without_labels(make_inputs(padding))
        options = {"max_new_tokens": 8, "min_new_tokens": 8, "num_beams": 2, "output_scores": True}
        of_sdpa, model = (adapt(make_llava(vision, text, name)) for name in ("sdpa", attn))
        output, expected = (
            other.generate(**inputs, **options, return_dict_in_generate=True) for other in (model, of_sdpa)
        )
        assert torch.equal(output.sequences, expected.sequences)
        assert_close(output.sequences_scores, expected.sequences_scores)


MAIN_FAMILIES = {
    "llava": KERNELS,
    "llava_next": KERNELS,
    "llava_onevision": KERNELS,
    "qwen2_vl": KERNELS[:1],
    "qwen2_5_vl": KERNELS[:1],
    "qwen3_vl": KERNELS[:1],
    "internvl": KERNELS,
    "gemma3": KERNELS[1:],  # its images see in both directions, which no flash attention can say
    "idefics3": KERNELS,
    "smolvlm": KERNELS,
    "ovis2": KERNELS,
}


@pytest.mark.parametrize("name", MAIN_FAMILIES)
def test_families_are_compared(name):
    """What `check_attention` leaves out where the base model does not run with an implementation is not too much."""
    tuned = Tuned(next(family for family in FAMILIES if family.name == name))
    assert tuple(attn for attn in KERNELS if tuned.base_runs_with(attn)) == MAIN_FAMILIES[name]


class TestPacking:
    """Several samples in one row, which restart their positions: each gives what it gives alone."""

    LENGTHS = (14, 9, 11)

    def pack(self):
        """Samples of other lengths, each with an image but the last."""
        samples = []
        for seed, length in enumerate(self.LENGTHS):
            sample = {name: value[:1] for name, value in make_inputs("no mask", seed=seed).items()}
            samples.append({"input_ids": sample["input_ids"][:, :length], "pixel_values": sample["pixel_values"]})
        samples[-1] = {"input_ids": samples[-1]["input_ids"].clamp(max=90)}
        packed = {
            "input_ids": torch.cat([sample["input_ids"] for sample in samples], dim=1),
            "pixel_values": torch.cat([sample["pixel_values"] for sample in samples[:-1]]),
            "position_ids": torch.cat([torch.arange(length) for length in self.LENGTHS])[None],
            # With a cache, transformers takes no row for several samples.
            "use_cache": False,
        }
        return samples, packed

    def check(self, model, samples, packed):
        logits = model(**packed).logits[0].split(self.LENGTHS)
        for of_sample, sample in zip(logits, samples):
            assert_close(of_sample, model(**sample).logits[0])

    @pytest.mark.parametrize("text", ["llama", "mistral"])
    @pytest.mark.parametrize("attn", ["eager", "sdpa", *KERNELS])
    def test_by_positions(self, attn, text):
        self.check(adapt(make_llava(text=text, attn=attn)), *self.pack())

    def with_boundaries(self, packed):
        boundaries = torch.tensor([0, *self.LENGTHS]).cumsum(0).int()
        longest = max(self.LENGTHS)
        arguments = {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries}
        return {**packed, **arguments, "max_length_q": longest, "max_length_k": longest}

    @pytest.mark.parametrize("text", ["llama", "mistral"])
    def test_by_boundaries(self, text):
        samples, packed = self.pack()
        samples = [{"input_ids": sample["input_ids"].clamp(max=90)} for sample in samples]
        packed = {**packed, "input_ids": packed["input_ids"].clamp(max=90), "pixel_values": None}
        self.check(adapt(make_llava(text=text, attn="flash_attention_2")), samples, self.with_boundaries(packed))

    def test_by_boundaries_with_images(self):
        samples, packed = self.pack()
        packed = self.with_boundaries(packed)
        model = adapt(make_llava(attn="flash_attention_2"))
        if Version(transformers.__version__) < Version("5.24"):
            self.check(model, samples, packed)
            return
        # They reach the vision encoder too, where they fit nothing, with prompts or without.
        with pytest.raises(UnsupportedModelError, match="CLIPVisionModel got the boundaries of packed text"):
            model(**packed)
        with model.disable_adapter(), pytest.raises(AssertionError):
            model(**packed)


def test_positions_that_tell_of_no_packing():
    """A gap, or the places of patches in a grid that is wider than the image: one sequence all the same."""
    inputs = {"input_ids": torch.arange(3, 12)[None], "position_ids": torch.tensor([[0, 1, 2, 3, 4, 8, 9, 10, 11]])}
    # Without a cache, transformers takes a gap for the start of a sequence in its masks, and not for flash attention.
    expected = adapt(make_llava())(**inputs, use_cache=True).logits
    assert_close(adapt(make_llava(attn="flash_attention_2"))(**inputs, use_cache=False).logits, expected)
    image = {"pixel_values": torch.ones(1, 3, 24, 16), "image_sizes": torch.tensor([[24, 16]])}
    model = Tuned(next(family for family in FAMILIES if family.name == "mistral3")).tune("flash_attention_2")
    tower = model.base_model.model.model.vision_tower
    try:
        with model.disable_adapter():
            tower(**image)
    except AssertionError:
        # Flash attention itself takes these for packing, in transformers 5.19.
        assert Version("5.16") <= Version(transformers.__version__) < Version("5.23")
        return
    of_flash = tower(**image).last_hidden_state
    model.set_attn_implementation("sdpa")
    assert_close(of_flash, tower(**image).last_hidden_state)


def test_window_longer_than_the_tokens_takes_the_kernel():
    """Prompts are never outside of the window, however long they are."""
    inputs = {"input_ids": torch.arange(3, 3 + SLIDING_WINDOW)[None]}
    logits = []
    for attn in ("sdpa", "flash_attention_2"):
        model = adapt(make_llava(text="mistral", attn=attn), num_textual_tokens=2 * SLIDING_WINDOW)
        calls.clear()
        logits.append(model(**inputs).logits)
    assert_close(*logits)
    assert calls == ["flash_attn_func"] * 3


def test_window_with_what_sdpa_cannot_do():
    config = make_llava(text="mistral", attn="flash_attention_2").config
    config.text_config = transformers.Gemma2Config(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        vocab_size=97,
        sliding_window=SLIDING_WINDOW,
        pad_token_id=0,
    )
    config._attn_implementation = "flash_attention_2"
    model = adapt(transformers.LlavaForConditionalGeneration(config).eval())
    logits = [model(input_ids=torch.arange(3, 3 + SLIDING_WINDOW)[None]).logits]
    with pytest.raises(UnsupportedModelError, match=r"shorter than the 6 tokens, with softcap, .*'eager'"):
        model(input_ids=torch.arange(3, 4 + SLIDING_WINDOW)[None])
    model.get_base_model().set_attn_implementation("eager")
    logits.append(model(input_ids=torch.arange(3, 3 + SLIDING_WINDOW)[None]).logits)
    assert_close(*logits)
    assert model(input_ids=torch.arange(3, 4 + SLIDING_WINDOW)[None]).logits.isfinite().all()


@torch.no_grad()
def test_kernels_from_the_hub():
    """Those that transformers calls as it calls flash attention are supported under any name."""
    inputs = make_inputs("left")
    expected = adapt(make_llava())(**inputs).loss
    AttentionInterface.register("kernels-community/flash-attn2", flash_attention_forward)
    AttentionInterface.register("kernels-community/other", lambda *args, **kwargs: None)
    transformers.AttentionMaskInterface.register(
        "kernels-community/flash-attn2", transformers.masking_utils.flash_attention_mask
    )
    try:
        model = adapt(make_llava())
        for part in (model.config, model.config.text_config, model.config.vision_config):
            part._attn_implementation = "kernels-community/flash-attn2"
        # The kernel itself is not there to be loaded.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transformers.modeling_flash_attention_utils, "_loaded_implementation", None)
            patch.setattr(
                transformers.modeling_flash_attention_utils,
                "_lazy_imports",
                lambda *args, of=transformers.modeling_flash_attention_utils._lazy_imports, **kwargs: of(
                    "flash_attention_2"
                ),
            )
            assert_close(model(**inputs).loss, expected)
        model.config.vision_config._attn_implementation = "kernels-community/other"
        with pytest.raises(UnsupportedModelError, match="'kernels-community/other', which M2PT does not support"):
            model(**inputs)
    finally:
        for name in ("kernels-community/flash-attn2", "kernels-community/other"):
            AttentionInterface._global_mapping.pop(name)
        transformers.AttentionMaskInterface._global_mapping.pop("kernels-community/flash-attn2")


def test_modules_imported_beside_the_stand_ins_stay(monkeypatch):
    """Some cannot be imported twice: torch._inductor registers things."""
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with stand_ins():
        import colorsys
    assert sys.modules["colorsys"] is colorsys
