"""TRL: supervised fine-tuning, packing, preferences, and reinforcement by a reward."""

import math

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from families import FAMILIES
from families.checks import Tuned
from helpers.attention_kernels import KERNELS, stand_ins
from helpers.models import adapt, make_config, make_llava, trained_by
from helpers.processors import CHAT_TEMPLATE, COLOURS, make_processor
from helpers.trl import arguments, share_of_low_tokens, snapshot
from peft import PeftModel
from PIL import Image
from torch.nn import functional as F
from transformers import TrainerCallback
from trl import (
    DistillationConfig,
    DistillationTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration

from peft_m2pt import M2PTModel, UnsupportedModelError


QUESTION = {"role": "user", "content": "which colour is it"}


def answer(text):
    return {"role": "assistant", "content": text}


def image_of(colour):
    return Image.new("RGB", (16, 16), COLOURS[colour])


def image_rows():
    return Dataset.from_list(
        [{"images": [image_of(colour)], "messages": [QUESTION, answer(colour)]} for colour in COLOURS] * 2
    )


def text_rows():
    """Conversations of several lengths."""
    say = {"role": "user", "content": "say the word"}
    words = list(COLOURS)
    return Dataset.from_list([{"messages": [say, answer(" ".join(words[: 1 + i % 3]))]} for i in range(6)])


def preferences():
    colours = list(COLOURS)
    return Dataset.from_list(
        [
            {
                "images": [image_of(colour)],
                "prompt": [QUESTION],
                "chosen": [answer(colour)],
                "rejected": [answer(f"not {colours[i - 1]}")],
            }
            for i, colour in enumerate(colours)
        ]
        * 2
    )


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def check_moved(model, before):
    """What the active adapter trains has moved, and nothing else."""
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


class Gradients(TrainerCallback):
    """Notes which weights have got a gradient."""

    def __init__(self):
        self.names = set()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.names |= {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


@torch.no_grad()
def log_probs(model, batch):
    """What a model gives to each token but the first, the long way."""
    logits = model(
        **{name: value for name, value in batch.items() if name not in ("labels", "completion_mask")}
    ).logits
    return logits[:, :-1].float().log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]


class TestSFT:
    def make_trainer(self, folder, dataset=None, model=None, config=None, processor=None, callbacks=(), **kwargs):
        return SFTTrainer(
            model or make_llava(),
            SFTConfig(**arguments(folder, **kwargs)),
            train_dataset=dataset or image_rows(),
            processing_class=processor or make_processor(),
            peft_config=config or make_config(),
            callbacks=list(callbacks),
        )

    @pytest.mark.parametrize("kwargs", [{"bf16": True}, {"gradient_checkpointing": False}], ids=str)
    def test_training(self, kwargs, tmp_path):
        gradients = Gradients()
        trainer = self.make_trainer(tmp_path, callbacks=[gradients], max_steps=10, assistant_only_loss=True, **kwargs)
        assert trainer.args.gradient_checkpointing == ("bf16" in kwargs)
        before = snapshot(trainer.model)
        trainer.train()
        losses = losses_of(trainer)
        assert losses[-1] < 0.5 * losses[0]
        assert gradients.names == trained_by(trainer.model).keys()
        check_moved(trainer.model, before)

        trainer.save_model(str(tmp_path))
        loaded = PeftModel.from_pretrained(make_llava(), tmp_path)
        batch = next(iter(trainer.get_train_dataloader()))
        with torch.autocast("cpu", torch.bfloat16, enabled=trainer.args.bf16):
            assert torch.equal(log_probs(loaded, batch), log_probs(trainer.model.eval(), batch))

    def test_loss_on_answers_only(self, tmp_path):
        """Two turns, one image or none: the loss is that of the answers and of what ends them."""
        rows = [
            {"images": [image_of("red")], "messages": [QUESTION, answer("red"), QUESTION, answer("not blue")]},
            {"images": [], "messages": [QUESTION, answer("say it")]},
        ]
        model = adapt(make_llava())
        trainer = self.make_trainer(
            tmp_path, Dataset.from_list(rows), assistant_only_loss=True, per_device_train_batch_size=2
        )
        trainer.model.load_state_dict(model.state_dict())
        batch = trainer.data_collator(rows)
        tokenizer = trainer.processing_class.tokenizer
        answers = [["red </s>", "not blue </s>"], ["say it </s>"]]
        expected = []
        for i, texts in enumerate(answers):
            tokens = batch["input_ids"][i][batch["attention_mask"][i].bool()]
            kept = batch["labels"][i][batch["labels"][i] != -100]
            assert tokenizer.decode(kept) == " ".join(texts)
            sample = {"input_ids": tokens[None]}
            if rows[i]["images"]:
                sample["pixel_values"] = batch["pixel_values"]
            scores = log_probs(model, sample)[0]
            # An answer starts behind "ASSISTANT:" and is as long as its words are many.
            starts = (tokens == tokenizer.convert_tokens_to_ids("ASSISTANT:")).nonzero()[:, 0].tolist()
            expected += [scores[start : start + len(text.split())] for start, text in zip(starts, texts)]
        expected = -torch.cat(expected)
        assert len(expected) == 8
        loss = trainer.compute_loss(trainer.model.eval(), dict(batch))
        torch.testing.assert_close(loss.detach(), expected.mean())

    def test_modules_to_save(self, tmp_path):
        """TRL reads the weight of the head itself."""
        names = ["embed_tokens", "lm_head"]
        trainer = self.make_trainer(tmp_path, config=make_config(modules_to_save=names))
        before = snapshot(trainer.model)
        trainer.train()
        check_moved(trainer.model, before)
        saved = [name for name, p in trainer.model.named_parameters() if p.requires_grad and "modules_to_save" in name]
        assert [name.split(".modules_to_save")[0].rpartition(".")[2] for name in saved] == names

    def test_new_tokens(self, tmp_path):
        """The chat template of another model can bring tokens, of which TRL wants to train the embeddings alone."""
        tokenizer = make_processor().tokenizer
        tokenizer.add_tokens(["<turn>"], special_tokens=True)
        tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.save_pretrained(tmp_path)
        with pytest.raises(
            AttributeError, match=r"no trainable_token_indices.*chat_template_path.*modules_to_save=\["
        ):
            self.make_trainer(
                tmp_path,
                text_rows(),
                processor=make_processor().tokenizer,
                chat_template_path=str(tmp_path),
            )


QWEN = next(family for family in FAMILIES if family.name == "qwen2_5_vl")
TWO_SEQUENCES = {
    "input_ids": torch.tensor([[5, 6, 7, 8, 9]]),
    "position_ids": torch.tensor([[0, 1, 2, 0, 1]]),
    "cu_seq_lens_q": torch.tensor([0, 3, 5], dtype=torch.int32),
    "cu_seq_lens_k": torch.tensor([0, 3, 5], dtype=torch.int32),
    "max_length_q": 3,
    "max_length_k": 3,
}


def refusal(attn):
    return f"several sequences packed.*attn_implementation='{attn}'.*'model.language_model.layers.0.self_attn'"


@pytest.fixture
def kernels():
    with stand_ins():
        yield


@pytest.mark.usefixtures("kernels")
class TestPacking:
    make_trainer = TestSFT.make_trainer

    @pytest.mark.parametrize("text", ["llama", "mistral", "qwen2"])
    @pytest.mark.parametrize("attn", ["eager", "sdpa", *KERNELS])
    @pytest.mark.parametrize("kwargs", [{"packing": True, "max_length": 20}, {"padding_free": True}], ids=str)
    def test_exact_for_each_sequence(self, kwargs, attn, text, tmp_path):
        alone = adapt(make_llava(text=text))
        kwargs = {"max_length": None, "gradient_checkpointing": False, **kwargs}
        trainer = self.make_trainer(tmp_path, text_rows(), make_llava(text=text, attn=attn), **kwargs)
        trainer.model.load_state_dict(alone.state_dict())
        batch = next(iter(trainer.get_train_dataloader()))
        starts = (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
        rows = batch["input_ids"][0].tensor_split(starts[1:])
        assert batch["input_ids"].shape[0] == 1 and len(rows) > 2 and len({len(row) for row in rows}) > 1

        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = trainer.model(**inputs, use_cache=False).logits[0]
        for row, of_row in zip(rows, logits.tensor_split(starts[1:])):
            torch.testing.assert_close(of_row, alone(row[None]).logits[0], atol=2e-5, rtol=1e-5)
        scores = torch.cat([log_probs(alone, {"input_ids": row[None]})[0] for row in rows])
        loss = trainer.compute_loss(trainer.model, dict(batch))
        torch.testing.assert_close(loss.detach(), -scores.mean())

        loss.backward()
        for row in rows:
            (alone(row[None], labels=row[None]).loss * (len(row) - 1) / len(scores)).backward()
        expected = trained_by(alone)
        for name, parameter in trained_by(trainer.model).items():
            if "vision_tower" in name:
                assert parameter.grad is None
            else:
                torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-5, rtol=1e-4, msg=name)

    def test_training(self, tmp_path):
        trainer = self.make_trainer(tmp_path, text_rows(), packing=True, max_length=20, max_steps=6)
        trainer.train()
        losses = losses_of(trainer)
        assert losses[-1] < 0.7 * losses[0]

    @pytest.mark.parametrize("option, message", [("packing", "Packing"), ("padding_free", "Padding-free training")])
    def test_images_are_refused_by_trl(self, option, message, tmp_path):
        with pytest.raises(ValueError, match=f"{message} is .*not supported for vision datasets"):
            self.make_trainer(tmp_path, **{option: True})

    @pytest.mark.parametrize("names", [("cu_seq_lens_q", "position_ids"), ("position_ids",)], ids="-".join)
    @pytest.mark.parametrize("attn", ["eager", "sdpa", "flex_attention"])
    def test_refused_with_a_cache(self, attn, names):
        """transformers looks for packed sequences only if there is none."""
        inputs = {name: TWO_SEQUENCES[name] for name in ("input_ids", *names)}
        with pytest.raises(UnsupportedModelError, match=f"{refusal(attn)}.*use_cache=False"):
            adapt(make_llava(attn=attn))(**inputs, use_cache=True)

    @pytest.mark.parametrize("boundaries", [[0, 5, 5], [0, 0, 5]], ids=str)
    @pytest.mark.parametrize("attn", ["eager", "sdpa"])
    def test_empty_sequences(self, attn, boundaries):
        model = adapt(make_llava(attn=attn))
        inputs = {"input_ids": TWO_SEQUENCES["input_ids"]}
        logits = model(**inputs, cu_seq_lens_q=torch.tensor(boundaries, dtype=torch.int32)).logits
        assert torch.equal(logits, model(**inputs).logits)

    @pytest.mark.parametrize("attn", ["eager", "sdpa"])
    def test_refused_without_a_mask(self, attn):
        """Qwen2.5-VL makes none out of the positions that TRL gives it."""
        model = Tuned(QWEN).tune(attn)
        with pytest.raises(UnsupportedModelError, match=f"{refusal(attn)}.*packing=False.*flash_attention_2"):
            model(**TWO_SEQUENCES, use_cache=False)
        with model.disable_adapter():
            assert model(**TWO_SEQUENCES, use_cache=False).logits.isfinite().all()
        # One sequence is nothing to keep apart.
        boundaries = torch.tensor([0, 5], dtype=torch.int32)
        one = {"position_ids": torch.arange(5)[None], "cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries}
        logits = model(**{**TWO_SEQUENCES, **one}, use_cache=False).logits
        torch.testing.assert_close(logits, model(input_ids=TWO_SEQUENCES["input_ids"]).logits)

    def test_flash_attention_needs_no_mask(self):
        tuned = Tuned(QWEN)
        logits = tuned.tune("flash_attention_2")(**TWO_SEQUENCES, use_cache=False).logits
        alone = [tuned.model(tokens).logits for tokens in TWO_SEQUENCES["input_ids"].tensor_split([3], dim=1)]
        torch.testing.assert_close(logits, torch.cat(alone, dim=1), atol=2e-5, rtol=1e-4)


class TestDPO:
    def make_trainer(self, folder, model, config=None, **kwargs):
        return DPOTrainer(
            model,
            args=DPOConfig(**arguments(folder, **kwargs)),
            train_dataset=preferences(),
            processing_class=make_processor(),
            peft_config=config,
        )

    def summed_log_probs(self, model, batch):
        return (log_probs(model, batch) * batch["completion_mask"][:, 1:]).sum(dim=1)

    def test_reference_without_adapter(self, tmp_path):
        base = make_llava()
        trainer = self.make_trainer(tmp_path, make_llava(), make_config())
        batch = next(iter(trainer.get_train_dataloader()))
        reference = self.summed_log_probs(base, batch)
        torch.testing.assert_close(torch.cat(trainer.compute_ref_log_probs(trainer.model, batch)), reference)

        policy = self.summed_log_probs(trainer.model, batch)
        assert (policy - reference).abs().min() > 0.01
        chosen, rejected = (policy - reference).chunk(2)
        expected = -F.logsigmoid(trainer.beta * (chosen - rejected)).mean()
        torch.testing.assert_close(trainer.compute_loss(trainer.model, batch).detach(), expected)

        before = snapshot(trainer.model)
        trainer.train()
        check_moved(trainer.model, before)
        assert losses_of(trainer)[-1] < losses_of(trainer)[0]
        torch.testing.assert_close(torch.cat(trainer.compute_ref_log_probs(trainer.model, batch)), reference)

    @pytest.mark.parametrize(
        "kwargs",
        [{}, {"connector_rank": 2}, {"modules_to_save": ["lm_head"]}, {"tune_connector": False}],
        ids=str,
    )
    def test_reference_from_pretrained_adapter(self, kwargs, tmp_path):
        adapt(make_llava(), **kwargs).save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(make_llava(), tmp_path, is_trainable=True)
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        pretrained = snapshot(model)
        trainer = self.make_trainer(tmp_path, model, max_steps=8)
        before = snapshot(trainer.model)
        assert len(names) > 8
        for name in names:
            assert torch.equal(before[name], pretrained[name]), name
            assert torch.equal(before[name.replace(".default.", ".ref.")], pretrained[name]), name
        batch = next(iter(trainer.get_train_dataloader()))
        reference = torch.cat(trainer.compute_ref_log_probs(trainer.model, batch))
        expected = self.summed_log_probs(PeftModel.from_pretrained(make_llava(), tmp_path), batch)
        torch.testing.assert_close(reference, expected)

        trainer.train()
        losses = losses_of(trainer)
        assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[-1] < 0.9 * losses[0]
        assert {name for name, p in trainer.model.named_parameters() if p.requires_grad} == set(names)
        check_moved(trainer.model, before)
        assert torch.equal(torch.cat(trainer.compute_ref_log_probs(trainer.model, batch)), reference)


class TestGRPO:
    def make_trainer(self, folder, model, config=None, **kwargs):
        rows = [{"image": image_of(colour), "prompt": [QUESTION]} for colour in COLOURS] * 2
        options = {"num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 5, **kwargs}
        return GRPOTrainer(
            model,
            reward_funcs=share_of_low_tokens,
            args=GRPOConfig(**arguments(folder, **options)),
            train_dataset=Dataset.from_list(rows),
            processing_class=make_processor(),
            peft_config=config,
        )

    def test_reward_rises(self, tmp_path):
        options = {"max_steps": 25, "num_generations": 16, "per_device_train_batch_size": 32}
        trainer = self.make_trainer(tmp_path, make_llava(), make_config(), lr_scheduler_type="constant", **options)
        before = snapshot(trainer.model)
        trainer.train()
        check_moved(trainer.model, before)
        rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
        assert sum(rewards[-5:]) / 5 > 0.2 + sum(rewards[:5]) / 5

    def test_reference_from_pretrained_adapter(self, tmp_path):
        trainer = self.make_trainer(tmp_path, adapt(make_llava()), beta=0.1, max_steps=2)
        before = snapshot(trainer.model)
        trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
        assert len(trained) == 13
        assert all(torch.equal(before[name], before[name.replace(".default.", ".ref.")]) for name in trained)
        trainer.train()
        check_moved(trainer.model, before)
        divergences = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
        assert divergences[0] == pytest.approx(0, abs=1e-5) and divergences[1] > 1e-3

    def test_vllm(self):
        """TRL merges an adapter to hand a model over to vLLM, and leaves out all that is called like its method."""
        model = adapt(make_llava())
        assert all(M2PTModel.prefix in name for name in trained_by(model))
        with pytest.raises(NotImplementedError, match="M2PT cannot be merged.*additional keys and values.*`unload"):
            model.merge_adapter()
        generation = object.__new__(VLLMGeneration)
        generation.model = model
        generation._dist = DistributedBackend(Accelerator(cpu=True))
        with pytest.raises(NotImplementedError, match="M2PT cannot be merged"):
            list(generation._iter_named_params())


class TestOthers:
    """With images, everything that is trained moves, and nothing else. What they score is looked at elsewhere."""

    def check(self, trainer):
        before = snapshot(trainer.model)
        trainer.train()
        check_moved(trainer.model, before)
        assert all(map(math.isfinite, losses_of(trainer)))

    def options(self, rows):
        return {
            "train_dataset": Dataset.from_list(rows),
            "processing_class": make_processor(),
            "peft_config": make_config(),
        }

    def test_kto(self, tmp_path):
        rows = [
            {"images": [image_of(colour)], "prompt": [QUESTION], "completion": [answer(word)], "label": word == colour}
            for colour in COLOURS
            for word in COLOURS
        ]
        config = KTOConfig(**arguments(tmp_path))
        self.check(KTOTrainer(make_llava(), args=config, **self.options(rows)))

    def test_rloo(self, tmp_path):
        rows = [{"image": image_of(colour), "prompt": [QUESTION]} for colour in COLOURS] * 2
        config = RLOOConfig(
            **arguments(tmp_path, num_generations=4, per_device_train_batch_size=8, max_completion_length=5)
        )
        trainer = RLOOTrainer(make_llava(), reward_funcs=share_of_low_tokens, args=config, **self.options(rows))
        self.check(trainer)

    def test_distillation(self, tmp_path):
        rows = [{"image": image_of(colour), "prompt": [QUESTION]} for colour in COLOURS] * 2
        config = DistillationConfig(**arguments(tmp_path, max_completion_length=5))
        self.check(DistillationTrainer(make_llava(), teacher_model=make_llava(), args=config, **self.options(rows)))
