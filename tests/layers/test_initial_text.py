"""The text that prompts start as: given, or written by the model."""

import math

import pytest
import torch
from families import FAMILIES
from families import spec as of_families
from helpers.models import TEXT, VOCAB_SIZE, make_llava
from helpers.states import TOKENS, change_config, only_text, prompts_of, tower_states
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import LlamaConfig, PreTrainedTokenizerFast

from peft_m2pt import M2PTConfig, UnsupportedModelError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Words "w3" to "w95", and a token that begins every text."""
    folder = tmp_path_factory.mktemp("tokenizer")
    words = {"<pad>": 0, "<s>": 1, **{f"w{i}": i for i in range(2, VOCAB_SIZE + 3)}}
    model = Tokenizer(WordLevel(words, unk_token="<pad>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", bos_token="<s>").save_pretrained(folder)
    return str(folder)


UNREADABLE = {
    "florence2": r"'model.language_model' \(BartModel\) belongs to an encoder-decoder model.*Leave init_text",
    "diffusion_gemma": r"\(DiffusionGemmaDecoderModel\) takes no input_ids.*Leave init_text",
    "idefics": r"'model' \(IdeficsModel\) cannot read a text by itself: Exactly 1 of pixel_values.*Leave init_text",
}


class TestTheModelsOwnText:
    """Without a text in the config."""

    @torch.no_grad()
    def written_by(self, model, num_tokens, beginning=1):
        """Greedy search over ordinary tokens: no beginnings, ends, padding, or images."""
        tokens = [beginning]
        while len(tokens) < num_tokens:
            scores = model(torch.tensor([tokens])).logits[0, -1]
            scores[[0, 1, 2, 96]] = -torch.inf
            tokens.append(scores.argmax().item())
        return tokens

    @pytest.mark.parametrize("num_textual_tokens", [1, 7])
    def test_is_what_it_takes_for_likeliest(self, num_textual_tokens):
        tokens = self.written_by(make_llava(), num_textual_tokens)
        peft_model = get_peft_model(make_llava(), M2PTConfig(num_textual_tokens=num_textual_tokens))
        states = tower_states(make_llava(), tokens)
        for i in range(3):
            prompt = prompts_of(peft_model)[f"model.language_model.layers.{i}.self_attn.m2pt_prompt"]
            torch.testing.assert_close(prompt(), states[i])

    def test_is_the_same_for_every_seed(self):
        prompts = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            prompts.append(prompts_of(get_peft_model(make_llava(), M2PTConfig())))
        assert all(torch.equal(prompt(), prompts[1][name]()) for name, prompt in prompts[0].items())

    def test_without_a_token_to_begin_with(self, monkeypatch):
        """What ends texts is a boundary too."""
        without = lambda **kwargs: LlamaConfig(**{**kwargs, "bos_token_id": None, "eos_token_id": [2, 7]})  # noqa: E731
        monkeypatch.setitem(TEXT, "llama", without)
        model = make_llava()
        model.generation_config.bos_token_id = None
        peft_model = get_peft_model(model, only_text(init_token_ids=None))
        prompt = prompts_of(peft_model)["model.language_model.layers.0.self_attn.m2pt_prompt"]
        torch.testing.assert_close(prompt()[0], model.get_input_embeddings().weight[2])

    def test_without_an_output(self):
        """The likeliest token is the one whose embedding the last state points at."""
        body = make_llava().model
        embeddings = body.get_input_embeddings().weight
        state = body.language_model(torch.tensor([[1]])).last_hidden_state[0, -1]
        scores = embeddings @ state
        scores[[0, 1, 2, 96]] = -torch.inf
        prompt = prompts_of(get_peft_model(body, only_text(init_token_ids=None)))[
            "language_model.layers.0.self_attn.m2pt_prompt"
        ]
        torch.testing.assert_close(prompt()[1], embeddings[scores.argmax()])

    @pytest.mark.parametrize(
        "family", [f for f in FAMILIES if f.is_known and f.name in UNREADABLE], ids=lambda f: f.name
    )
    def test_models_that_cannot_write(self, family):
        """Their prompts start at random, and are told from those of others."""
        reason = UNREADABLE[family.name].removesuffix(".*Leave init_text")
        model = of_families.make_model(family, "sdpa")
        with pytest.warns(UserWarning, match=f"{reason}.*Textual prompts start at random, as with 'xavier_uniform'"):
            peft_model = get_peft_model(model, only_text(init_token_ids=None))
        for prompt in prompts_of(peft_model).values():
            bound = math.sqrt(6 / (4 * prompt.width))
            assert 0 < prompt().abs().max() <= bound and prompt.scale is not None


class TestText:
    def test_the_tokenizer_of_the_base_model(self, tokenizer, tmp_path):
        model = make_llava()
        model.name_or_path = tokenizer
        expected = prompts_of(get_peft_model(make_llava(), only_text(init_token_ids=[1, 60, 7])))
        for peft_model in (
            get_peft_model(model, only_text(init_text="w60 w7")),
            get_peft_model(make_llava(), only_text(init_text="w60 w7", tokenizer_name_or_path=tokenizer)),
        ):
            assert all(torch.equal(prompt(), expected[name]()) for name, prompt in prompts_of(peft_model).items())
        peft_model.save_pretrained(tmp_path)
        saved = M2PTConfig.from_pretrained(tmp_path)
        assert (saved.init_text, saved.tokenizer_name_or_path) == ("w60 w7", tokenizer)
        # Nobody who loads the adapter needs the tokenizer; who adds one like it does.
        change_config(tmp_path, tokenizer_name_or_path="/nowhere")
        loaded = PeftModel.from_pretrained(make_llava(), tmp_path)
        assert all(torch.equal(prompt(), expected[name]()) for name, prompt in prompts_of(loaded).items())
        with pytest.raises(ValueError, match="tokenizer, and the one of '/nowhere' cannot be loaded"):
            loaded.add_adapter("new", loaded.peft_config["default"])

    @pytest.mark.parametrize(
        "kwargs, message",
        [
            (
                {"init_text": "w60"},
                r"init_text='w60' has 2 tokens, .* num_textual_tokens=3: .* num_textual_tokens=2, or",
            ),
            ({"init_text": "w60 w7 w8"}, r"init_text='w60 w7 w8' has 4 tokens, .* or choose a text of 3 tokens"),
            ({"init_text": "w60 w98"}, "init_text='w60 w98': token 98 has no embedding in the model, which has 97"),
            ({"init_token_ids": [5, 6, 97]}, "init_token_ids: token 97 has no embedding in the model, which has 97"),
        ],
    )
    def test_texts_that_do_not_fit(self, tokenizer, kwargs, message):
        model = make_llava()
        model.name_or_path = tokenizer
        modules = list(model.modules())
        with pytest.raises(ValueError, match=message):
            get_peft_model(model, only_text(**kwargs))
        assert all(module is before for module, before in zip(model.modules(), modules, strict=True))

    @pytest.mark.parametrize("name", ["", "/nowhere"])
    def test_no_tokenizer(self, name):
        model = make_llava()
        model.name_or_path = name
        what = f"the one of '{name}' cannot be loaded" if name else "the model does not say where it comes from"
        with pytest.raises(ValueError, match=rf"{what}(.|\n)*tokenizer_name_or_path='...', or .* init_token_ids="):
            get_peft_model(model, only_text(init_text="w60 w7"))
        get_peft_model(model, only_text(init_text="w60 w7"), low_cpu_mem_usage=True)

    @pytest.mark.parametrize(
        "values, message",
        [
            ({"init_text": ""}, "init_text='' is neither a string nor None"),
            ({"init_text": 3}, "init_text=3 is neither a string nor None"),
            ({"init_token_ids": "abc"}, "init_token_ids='abc' is not a list of token ids"),
            ({"init_token_ids": [1, -1]}, "init_token_ids=[1, -1] is not a list of token ids"),
            ({"init_token_ids": [1, 2.0]}, "init_token_ids=[1, 2.0] is not a list of token ids"),
            ({"init_token_ids": [1, 2]}, "init_token_ids has 2 tokens, but num_textual_tokens=10"),
            ({"init_token_ids": [1], "init_text": "a"}, "init_text and init_token_ids are both given"),
            (
                {"init_text": "a", "init_prompts": "normal"},
                "init_text says what textual prompts start as, but init_pr",
            ),
            (
                {"init_text": "a", "num_textual_tokens": 0},
                "init_text says what textual prompts start as, but num_text",
            ),
            ({"tokenizer_name_or_path": "a"}, "tokenizer_name_or_path names the tokenizer for init_text, which is no"),
        ],
        ids=str,
    )
    def test_bad_values(self, values, message):
        with pytest.raises(ValueError) as error:
            M2PTConfig(**{"init_prompts": "states", **values})
        assert message in str(error.value)

    @pytest.mark.parametrize(
        "family", [f for f in FAMILIES if f.is_known and f.name in UNREADABLE], ids=lambda f: f.name
    )
    def test_models_that_cannot_read_a_text_alone(self, family):
        message = UNREADABLE[family.name]
        model = of_families.make_model(family, "sdpa")
        training = [module.training for module in model.modules()]
        with pytest.raises(UnsupportedModelError, match=message):
            get_peft_model(model, only_text())
        assert [module.training for module in model.modules()] == training
        assert not any(module._forward_pre_hooks for module in model.modules())

    def test_states_that_are_not_finite(self):
        model = make_llava().half()
        with torch.no_grad():
            model.get_input_embeddings().weight[TOKENS[1]] = 6e4
            model.model.language_model.layers[0].mlp.down_proj.weight.mul_(1e4)
        with pytest.raises(
            UnsupportedModelError, match="not finite at 'model.language_model.layers.*in torch.float16"
        ):
            get_peft_model(model, only_text())

    def test_the_paper_has_no_units(self):
        peft_model = get_peft_model(make_llava(), M2PTConfig.paper(4, 3))
        assert all(prompt.scale is None for prompt in prompts_of(peft_model).values())
