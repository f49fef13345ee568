"""Whether, and how many, interaction prompts can go through a connector."""

import warnings

import pytest
import torch
from helpers.models import adapt, connector_of, make_config, make_inputs, make_llava, trained_by
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from peft_m2pt import M2PTConfig, M2PTConnector, UnsupportedModelError
from peft_m2pt.adapted import layer_of


IMAGE = {"interaction_placement": "image"}
NUM_INTERACTION = 2


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


class Matrix(nn.Module):
    """A connector without linear layers, as that of Gemma 3."""

    def __init__(self, width=48):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(32, width) / 6)

    def forward(self, image_features):
        return image_features @ self.matrix


class Wide(nn.Sequential):
    """A connector whose copy has more parameters than an update of the default rank."""

    def __init__(self):
        super().__init__(nn.Linear(32, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 48))


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
        peft_model = adapt(model, connector_rank=2).train().eval()
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
        message = r"'model.multi_modal_projector' \(Pool\): it does not map each row of image features"
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

    @pytest.mark.parametrize(
        "make, config, rank, weights",
        [
            (make_llava, {}, None, "linear_1.default.weight"),
            (lambda: with_connector(Wide), {}, 64, "lora_"),
            (lambda: with_connector(Wide), {"connector_rank": None}, None, "2.default.weight"),
            (make_llava, {"connector_rank": 3}, 3, "lora_"),
            (lambda: with_connector(Matrix), {}, None, "matrix"),
            (make_llava, {"tune_connector": False}, None, None),
        ],
    )
    def test_the_default_rank(self, tmp_path, make, config, rank, weights):
        """64, or a full copy if that has no more parameters. What is saved says which."""
        peft_model = adapt(make(), **{"connector_rank": "auto", **config})
        trained = [name for name in trained_by(peft_model) if "m2pt_connector" in name]
        assert bool(trained) == (weights is not None) and all(weights in name or rank is None for name in trained)
        assert not trained or any(weights in name for name in trained)
        peft_model.save_pretrained(tmp_path)
        saved = PeftConfig.from_pretrained(tmp_path)
        assert saved.connector_rank == rank
        inputs = make_inputs()
        loaded = PeftModel.from_pretrained(make(), tmp_path)
        torch.testing.assert_close(loaded(**inputs).logits, peft_model(**inputs).logits)
        numbers = peft_model.base_model.describe().split()
        assert f"{sum(parameter.numel() for parameter in trained_by(peft_model).values()):,}" in numbers

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
            ValueError, match=f"{field}=.* includes the connector 'model.multi_modal_projector' or a part"
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

    def test_quantized_connectors_are_not_copied(self):
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
