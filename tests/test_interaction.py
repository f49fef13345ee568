"""Interaction prompts and the tuned connector: what they are put into, and what they ask of processor and config."""

import copy
import warnings

import pytest
import torch
from models import (
    IMAGE_TOKEN,
    NUM_PATCHES,
    adapt,
    make_config,
    make_inputs,
    make_llava,
    randomise,
    trained_by,
    without_labels,
)
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoProcessor,
    CLIPImageProcessor,
    LlamaForCausalLM,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

from peft_m2pt import M2PTConfig, M2PTConnector, UnsupportedModelError, adapt_processor
from peft_m2pt.adapted import layer_of


IMAGE = {"interaction_placement": "image"}
NUM_INTERACTION = 2


def image_inputs(padding="none", **kwargs):
    return make_inputs(padding, num_image_tokens=NUM_PATCHES + NUM_INTERACTION, **kwargs)


def connector_of(peft_model):
    return peft_model.get_base_model().model.multi_modal_projector


class Pool(nn.Module):
    """A connector that makes two tokens of any number of rows."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 48)

    def forward(self, image_features):
        return self.linear(image_features.mean(1, keepdim=True)).expand(-1, 2, -1)


class Merge(nn.Module):
    """A connector that makes one token of 2 x 2 rows."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4 * 32, 48)

    def forward(self, image_features):
        return self.linear(image_features.reshape(len(image_features), -1, 4 * 32))


def with_connector(connector):
    torch.manual_seed(1)
    model = make_llava()
    model.model.multi_modal_projector = connector()
    return model


class TestNumbers:
    @pytest.mark.parametrize("placement, number", [("layers", 0), ("image", 5)])
    def test_as_many_as_visual_prompts_in_images(self, placement, number):
        config = M2PTConfig(num_visual_tokens=5, interaction_placement=placement)
        peft_model = get_peft_model(make_llava(), config)
        assert peft_model.peft_config["default"].to_dict()["num_interaction_tokens"] == number
        # The config may serve for another model, in which it is another number.
        assert config.num_interaction_tokens is None

    @pytest.mark.parametrize("config", [{"num_visual_tokens": 0}, {"num_textual_tokens": 0}])
    def test_none_if_one_kind_of_prompts_is_off(self, config):
        peft_model = get_peft_model(make_llava(), M2PTConfig(interaction_placement="image", **config))
        assert peft_model.peft_config["default"].to_dict()["num_interaction_tokens"] == 0
        assert not [name for name in trained_by(peft_model) if "interaction" in name]
        assert [name for name in trained_by(peft_model) if "connector" in name]

    def test_without_textual_prompts_if_asked(self):
        peft_model = adapt(make_llava(), num_textual_tokens=0)
        names = [name for name in trained_by(peft_model) if "language_model" in name]
        assert len(names) == 3 and all("m2pt_interaction" in name for name in names)

    def test_connectors_that_merge_rows(self):
        peft_model = adapt(with_connector(Merge))
        prompt = peft_model.get_base_model().model.language_model.layers[0].self_attn.m2pt_interaction["default"]
        assert (prompt.num_tokens, prompt.width) == (NUM_INTERACTION * 4, 32)
        inputs = make_inputs(num_image_tokens=1)
        loss = peft_model(**inputs).loss
        loss.backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in trained_by(peft_model).values())
        # The rows of a layer are what the connector makes of its prompt, four rows at a time.
        connector = connector_of(peft_model)
        layer = layer_of(peft_model.get_base_model().model.language_model.layers[0].self_attn)
        rows = layer._prompt("default", torch.empty(0))
        linear = connector.m2pt_connector_linear["default"]
        torch.testing.assert_close(rows[3:], linear(prompt.weight.reshape(NUM_INTERACTION, 4 * 32)))

    @pytest.mark.parametrize("kind", ["a linear layer", "reads widths"])
    def test_low_rank_updates_of_any_linear_layer(self, kind):
        class ReadsWidths(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(32, 48)

            def forward(self, image_features):
                return self.linear(image_features.reshape(-1, self.linear.in_features)).view(
                    *image_features.shape[:-1], self.linear.out_features
                )

        model = with_connector((lambda: nn.Linear(32, 48)) if kind == "a linear layer" else ReadsWidths)
        peft_model = adapt(model, connector_rank=2)
        inputs = make_inputs()
        with torch.no_grad():
            (down,) = (weight for name, weight in trained_by(peft_model).items() if "lora_A" in name)
            (up,) = (weight for name, weight in trained_by(peft_model).items() if "lora_B" in name)
            low_rank = peft_model(**inputs).logits
            connector = connector_of(peft_model)
            linear = connector if isinstance(connector, nn.Linear) else connector.linear
            # The same update, in the weights of the frozen connector.
            linear.weight += up @ down
            up.zero_()
            torch.testing.assert_close(low_rank, peft_model(**inputs).logits, atol=1e-4, rtol=1e-4)

    def test_connectors_that_take_no_rows(self):
        message = r"'model.multi_modal_projector' \(Pool\): it does not make one image token of each row"
        with pytest.warns(UserWarning, match=message) as caught:
            peft_model = get_peft_model(with_connector(Pool), M2PTConfig(interaction_placement="image"))
        assert len([warning for warning in caught if "Pool" in str(warning.message)]) == 1
        names = trained_by(peft_model)
        assert not [name for name in names if "interaction" in name]
        assert [name for name in names if "m2pt_connector_linear" in name]
        with pytest.raises(UnsupportedModelError, match=f"num_interaction_tokens=3: .*{message}"):
            get_peft_model(with_connector(Pool), M2PTConfig(num_interaction_tokens=3))
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*Pool.*")
            get_peft_model(with_connector(Pool), M2PTConfig())

    def test_no_connector(self):
        model = make_llava()
        model.model.bridge = model.model.multi_modal_projector
        del model.model.multi_modal_projector
        with pytest.warns(UserWarning, match="No connector was found in LlavaForConditionalGeneration.*connector="):
            get_peft_model(model, M2PTConfig()).unload()
        with pytest.raises(UnsupportedModelError, match="No connector was found"):
            get_peft_model(model, M2PTConfig(num_interaction_tokens=3))
        with pytest.raises(UnsupportedModelError, match="connector='model.nowhere'"):
            get_peft_model(model, M2PTConfig(num_interaction_tokens=3, connector="model.nowhere"))
        peft_model = get_peft_model(model, M2PTConfig(connector="model.bridge"))
        assert isinstance(layer_of(model.model.bridge), M2PTConnector)
        assert peft_model.peft_config["default"].to_dict()["num_interaction_tokens"] == 0

    def test_language_models_have_none(self, recwarn):
        model = LlamaForCausalLM(make_llava().config.text_config)
        get_peft_model(model, M2PTConfig(num_visual_tokens=0))
        assert not [warning for warning in recwarn if "connector" in str(warning.message)]

    def test_image_placement_where_it_has_no_place(self):
        with pytest.raises(UnsupportedModelError, match="interaction_placement='image'.*'layers'"):
            model = make_llava()
            model.config.model_type = "llava_next"
            get_peft_model(model, make_config(**IMAGE))

    @pytest.mark.parametrize(
        "values",
        [
            {"modules_to_save": ["multi_modal_projector"]},
            {"modules_to_save": ["linear_1"]},
            {"exclude_modules": ["multi_modal_projector"]},
        ],
        ids=str,
    )
    def test_connectors_that_are_named_twice(self, values):
        model = make_llava()
        modules = dict(model.named_modules())
        field = next(iter(values))
        with pytest.raises(
            ValueError, match=f"{field}=.* names the connector 'model.multi_modal_projector' or a part"
        ):
            get_peft_model(model, M2PTConfig(**values))
        assert dict(model.named_modules()) == modules

    def test_a_connector_that_is_asked_for_must_be_there(self):
        with pytest.raises(UnsupportedModelError, match="connector='model.nowhere'"):
            get_peft_model(make_llava(), M2PTConfig(connector="model.nowhere"))

    def test_towers_in_other_dtypes(self):
        for config in ({}, {"tune_connector": False}, {"connector_rank": 2}):
            model = make_llava()
            model.model.language_model.bfloat16()
            model.lm_head.bfloat16()
            peft_model = adapt(model, **config)
            peft_model(**make_inputs()).loss.backward()
            assert all(parameter.grad.abs().max() > 0 for parameter in trained_by(peft_model).values())

    def test_quantised_connectors_are_not_copied(self):
        model = make_llava()
        linear = model.model.multi_modal_projector.linear_2
        linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
        linear.forward = lambda x: nn.functional.linear(x, linear.weight.to(x.dtype), linear.bias)
        with pytest.raises(ValueError, match=r"'model.multi_modal_projector' .*\['linear_2'\].*connector_rank"):
            get_peft_model(model, make_config())
        get_peft_model(model, make_config(connector_rank=2))(**make_inputs()).loss.backward()

    def test_lm_head_beside_it(self):
        peft_model = adapt(make_llava(), modules_to_save=["lm_head"])
        peft_model(**make_inputs()).loss.backward()
        trainable = {name: parameter for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
        assert len(trainable) == len(trained_by(peft_model)) + 1
        assert all(parameter.grad.abs().max() > 0 for parameter in trainable.values())


@pytest.mark.parametrize(
    "values, message",
    [
        ({"num_interaction_tokens": -1}, "num_interaction_tokens=-1 is negative"),
        ({"num_interaction_tokens": "3"}, "num_interaction_tokens='3' is not an integer"),
        ({"interaction_placement": "tokens"}, "interaction_placement='tokens' is unknown"),
        ({"tune_connector": 1}, "tune_connector=1 is neither True nor False"),
        ({"connector_rank": 0}, "connector_rank=0 is not an integer above 0"),
        ({"connector_rank": 2, "tune_connector": False}, "connector_rank=2 says how to tune the connector"),
        ({"exclude_modules": "("}, "exclude_modules='(' is no regular expression"),
    ],
    ids=str,
)
def test_bad_values(values, message):
    with pytest.raises(ValueError) as error:
        M2PTConfig(**values)
    assert message in str(error.value)


KINDS = {"layers": {}, "image": IMAGE, "low rank": {"connector_rank": 2}, "frozen": {"tune_connector": False}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
class TestBehaviour:
    """What holds for prompts holds for the connector, in all its forms."""

    def make(self, kind, dtype):
        inputs = image_inputs("left") if kind == "image" else make_inputs("left")
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        return adapt(make_llava().to(dtype), **KINDS[kind]), inputs

    def test_gradients(self, kind, dtype):
        peft_model, inputs = self.make(kind, dtype)
        for checkpointing in (None, {"use_reentrant": True}, {"use_reentrant": False}):
            peft_model.zero_grad()
            if checkpointing is not None:
                peft_model.get_base_model().gradient_checkpointing_enable(checkpointing)
            peft_model.train()
            loss = peft_model(**inputs).loss
            loss.backward()
            gradients = {name: parameter.grad for name, parameter in trained_by(peft_model).items()}
            assert all(gradient.abs().max() > 0 for gradient in gradients.values())
            assert all(parameter.dtype == torch.float32 for parameter in trained_by(peft_model).values())
            if checkpointing is None:
                expected_loss, expected = loss, gradients
            assert loss == expected_loss
            for name, gradient in gradients.items():
                torch.testing.assert_close(gradient, expected[name], msg=lambda text, name=name: f"{name}: {text}")

    def test_disable_and_unload(self, kind, dtype):
        peft_model, inputs = self.make(kind, dtype)
        model = peft_model.get_base_model()
        base_inputs = make_inputs("left")
        base_inputs["pixel_values"] = base_inputs["pixel_values"].to(dtype)
        expected = make_llava().to(dtype)(**base_inputs).logits
        peft_model(**inputs)
        with peft_model.disable_adapter():
            assert torch.equal(peft_model(**base_inputs).logits, expected)
        assert torch.equal(peft_model.unload()(**base_inputs).logits, expected)
        assert model.state_dict().keys() == make_llava().state_dict().keys()
        assert not model._forward_pre_hooks and not model._forward_hooks

    def test_saving(self, kind, dtype, tmp_path):
        peft_model, inputs = self.make(kind, dtype)
        peft_model.save_pretrained(tmp_path)
        expected = peft_model(**inputs).logits
        for name in ("default", "other"):
            for low_cpu_mem_usage in (False, True):
                loaded = PeftModel.from_pretrained(
                    make_llava().to(dtype), tmp_path, adapter_name=name, low_cpu_mem_usage=low_cpu_mem_usage
                )
                for weight_name, weight in trained_by(peft_model).items():
                    assert torch.equal(trained_by(loaded)[weight_name.replace(".default.", f".{name}.")], weight)
                # A product with a thin matrix depends on where in memory that lies, and files are mapped into it.
                tolerance = (
                    (1e-4 if dtype == torch.float32 else 0.1) if kind == "low rank" and low_cpu_mem_usage else 0
                )
                torch.testing.assert_close(loaded(**inputs).logits, expected, atol=tolerance, rtol=0)

    def test_generation(self, kind, dtype):
        peft_model, inputs = self.make(kind, dtype)
        arguments = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None, "suppress_tokens": [IMAGE_TOKEN]}
        cached = peft_model.generate(**without_labels(inputs), **arguments)
        if dtype == torch.float32:
            uncached = peft_model.generate(**without_labels(inputs), **arguments, use_cache=False)
            assert torch.equal(cached, uncached)


def test_several_images_per_sample_and_none():
    peft_model = adapt(make_llava(), **IMAGE)
    inputs = without_labels(image_inputs())
    one = peft_model(**inputs).logits
    # Both images in one sample, one after the other.
    input_ids = inputs["input_ids"].reshape(1, -1)
    both = peft_model(input_ids=input_ids, pixel_values=inputs["pixel_values"]).logits
    length = inputs["input_ids"].shape[1]
    torch.testing.assert_close(both[0, :length], one[0], atol=1e-5, rtol=1e-5)
    assert peft_model(input_ids=make_inputs(images=False)["input_ids"]).logits.isfinite().all()


@pytest.mark.parametrize("num_image_tokens", [NUM_PATCHES, NUM_PATCHES + 5])
def test_wrong_numbers_of_placeholders_name_the_call(num_image_tokens):
    peft_model = adapt(make_llava(), **IMAGE)
    message = (
        f"has {2 * num_image_tokens} image tokens for 2 image.* each image needs 6: 4 for its own features and 2 for "
        r"the interaction prompts .*peft_m2pt.adapt_processor\(processor, config\)"
    )
    inputs = make_inputs(num_image_tokens=num_image_tokens)
    calls = [
        lambda: peft_model(**inputs),
        lambda: peft_model(inputs["input_ids"], inputs["pixel_values"]),
        lambda: peft_model.generate(**without_labels(inputs), max_new_tokens=2),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()
    # Nothing is left over from the errors, nor from one that has another reason.
    with pytest.raises(ValueError, match="Input image size"):
        peft_model(input_ids=inputs["input_ids"], pixel_values=torch.zeros(2, 3, 8, 8))
    features = peft_model.get_image_features(make_inputs()["pixel_values"]).pooler_output
    assert [len(feature) for feature in features] == [6, 6]
    assert peft_model(**image_inputs()).loss.isfinite()


def test_a_disabled_adapter_needs_the_processor_of_the_base_model():
    peft_model = adapt(make_llava(), **IMAGE)
    with peft_model.disable_adapter():
        message = "each image needs 4: 4 for its own features and 0 .*config has interaction_placement='layers'"
        with pytest.raises(ValueError, match=message):
            peft_model(**image_inputs())
        with pytest.raises(ValueError, match=message):
            peft_model.generate(**without_labels(image_inputs()), max_new_tokens=2)


def test_adapters_with_connectors_of_their_own():
    inputs = make_inputs()
    expected = [adapt(make_llava())(**inputs).logits, None]
    peft_model = adapt(make_llava())
    peft_model.add_adapter("other", make_config(connector_rank=3, num_interaction_tokens=1))
    before = {name: p.clone() for name, p in trained_by(peft_model).items()}
    randomise(peft_model, seed=4)
    with torch.no_grad():
        for name, parameter in trained_by(peft_model).items():
            if ".default." in name:
                parameter.copy_(before[name])
    assert torch.equal(peft_model(**inputs).logits, expected[0])
    peft_model.set_adapter("other")
    expected[1] = peft_model(**inputs).logits
    assert not torch.equal(*expected)
    with pytest.raises(ValueError, match=r"\['default', 'other'\] have each tuned the connector"):
        peft_model.base_model.set_adapter(["default", "other"])
        peft_model(**inputs)
    peft_model.set_adapter("other")
    peft_model.delete_adapter("default")
    assert torch.equal(peft_model(**inputs).logits, expected[1])
    assert not [name for name in trained_by(peft_model) if ".default." in name]


def test_the_frozen_connector_is_not_changed():
    model = make_llava()
    frozen = {name: value.clone() for name, value in model.model.multi_modal_projector.state_dict().items()}
    peft_model = adapt(model)
    optimizer = torch.optim.SGD([p for p in peft_model.parameters() if p.requires_grad], lr=0.1)
    before = {name: parameter.clone() for name, parameter in trained_by(peft_model).items()}
    peft_model(**make_inputs()).loss.backward()
    optimizer.step()
    assert all(not torch.equal(parameter, before[name]) for name, parameter in trained_by(peft_model).items())
    after = connector_of(peft_model).state_dict()
    assert all(torch.equal(after[name], frozen[name]) for name in frozen)


def make_processor(**kwargs):
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "what": 4, "<image>": IMAGE_TOKEN}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        **kwargs,
    )


class TestAdaptProcessor:
    def count(self, processor):
        image = torch.zeros(3, 16, 16, dtype=torch.uint8)
        inputs = processor(images=[image], text=["what <image>"], return_tensors="pt")
        return (inputs["input_ids"] == IMAGE_TOKEN).sum().item()

    def test_counts(self):
        processor = make_processor()
        assert self.count(processor) == NUM_PATCHES
        assert adapt_processor(processor, make_config(**IMAGE)) is processor
        assert self.count(processor) == NUM_PATCHES + NUM_INTERACTION
        adapt_processor(processor, make_config(**IMAGE))
        assert self.count(processor) == NUM_PATCHES + NUM_INTERACTION
        adapt_processor(processor, M2PTConfig.paper(7))
        assert self.count(processor) == NUM_PATCHES + 6
        adapt_processor(processor, make_config())
        assert self.count(processor) == NUM_PATCHES

    def test_survives_saving(self, tmp_path):
        adapt_processor(make_processor(), make_config(**IMAGE)).save_pretrained(tmp_path)
        processor = AutoProcessor.from_pretrained(tmp_path)
        assert self.count(processor) == NUM_PATCHES + NUM_INTERACTION
        adapt_processor(processor, make_config(**IMAGE))
        assert self.count(processor) == NUM_PATCHES + NUM_INTERACTION

    def test_processors_that_share_a_tokenizer(self):
        first = make_processor()
        second = copy.copy(first)
        for processor in (first, second):
            adapt_processor(processor, make_config(**IMAGE))
            assert self.count(processor) == NUM_PATCHES + NUM_INTERACTION

    def test_the_model_takes_it(self):
        peft_model = adapt(make_llava(), **IMAGE)
        processor = adapt_processor(make_processor(), peft_model.peft_config["default"])
        images = [torch.zeros(3, 16, 16, dtype=torch.uint8), torch.ones(3, 16, 16, dtype=torch.uint8)]
        inputs = processor(images=images, text=["what <image>", "<image> what"], return_tensors="pt")
        assert peft_model(**inputs).logits.isfinite().all()
        with pytest.raises(ValueError, match="adapt_processor"):
            peft_model(**make_processor()(images=images, text=["what <image>", "<image> what"], return_tensors="pt"))

    def test_other_processors_are_refused(self):
        class OtherProcessor(ProcessorMixin):
            def __init__(self):
                pass

        with pytest.raises(ValueError, match="OtherProcessor has no num_additional_image_tokens.*'layers'"):
            adapt_processor(OtherProcessor(), make_config(**IMAGE))
