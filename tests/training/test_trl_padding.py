"""TRL scores samples that are padded on the left as it scores them alone, and as `generate` sampled them."""

import functools

import pytest
import torch
from datasets import Dataset
from families import FAMILIES
from families.checks import enlarge_prompts, make_config
from families.spec import PAD, TEXT_IDS, VOCAB_SIZE, make_inputs, make_model
from helpers.processors import make_processor
from helpers.trl import arguments, share_of_low_tokens, snapshot
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
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
from trl.experimental.gkd import GKDConfig, GKDTrainer


NAMES = ["llava", "qwen2_5_vl"]
# What a completion may not hold: placeholders of media would have to come with media.
GENERATION = {"suppress_tokens": list(range(TEXT_IDS[1], VOCAB_SIZE))}
NUM_NEW_TOKENS = 5


def family_of(name):
    return next(family for family in FAMILIES if family.name == name)


def make_tuned(name, method="m2pt"):
    """A tiny model with an adapter that changes every output."""
    family = family_of(name)
    model = make_model(family, "sdpa")
    torch.manual_seed(4)
    if method == "lora":
        return get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model = get_peft_model(model, make_config(family))
    enlarge_prompts(model)
    return model


def make_prompts(name, images):
    """Two prompts of different lengths, one after the other, and what else belongs to their tokens and images."""
    if not images:
        ids = torch.randint(*TEXT_IDS, (15,), generator=torch.Generator().manual_seed(6)).tolist()
        return [ids[:9], ids[9:]], {}
    inputs = make_inputs(family_of(name))
    is_token = inputs.pop("attention_mask").bool()
    prompts = [row[mask].tolist() for row, mask in zip(inputs.pop("input_ids"), is_token)]
    if "mm_token_type_ids" in inputs:
        of_tokens = zip(inputs["mm_token_type_ids"], is_token)
        inputs["mm_token_type_ids"] = [row[mask].tolist() for row, mask in of_tokens]
    return prompts, inputs


def pad(rows, side, value=0):
    rows = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)


class Rollout:
    """Prompts padded on the left and completions padded on the right, as TRL puts them together."""

    def __init__(self, prompts, fields, completions):
        self.completions = [torch.tensor(row) for row in completions]
        self.prompt_ids, self.prompt_mask = pad(prompts, "left", PAD), pad([[1] * len(row) for row in prompts], "left")
        self.completion_ids = pad(completions, "right", PAD)
        self.completion_mask = pad([[1] * len(row) for row in completions], "right")
        self.input_ids = torch.cat([self.prompt_ids, self.completion_ids], dim=1)
        self.attention_mask = torch.cat([self.prompt_mask, self.completion_mask], dim=1)
        self.is_completion = torch.cat([torch.zeros_like(self.prompt_mask), self.completion_mask], dim=1)
        self.media = {key: value for key, value in fields.items() if isinstance(value, torch.Tensor)}
        self.of_tokens = {
            key: torch.cat([pad(value, "left"), torch.zeros_like(self.completion_ids)], dim=1)
            for key, value in fields.items()
            if key not in self.media
        }

    @property
    def fields(self):
        return {**self.media, **self.of_tokens}

    @property
    def batch(self):
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, **self.fields}

    @property
    def labels(self):
        return self.input_ids.masked_fill(self.is_completion == 0, -100)

    @torch.no_grad()
    def logits_alone(self, model):
        """What a model says of the tokens of each completion, the long way: sample by sample, without padding."""
        found = []
        for i, is_token in enumerate(self.attention_mask.bool()):
            media = {key: value.chunk(2)[i] for key, value in self.media.items()}
            of_tokens = {key: value[i, is_token][None] for key, value in self.of_tokens.items()}
            logits = model(self.input_ids[i, is_token][None], **media, **of_tokens).logits[0]
            found.append(logits[-len(self.completions[i]) - 1 : -1])
        return found

    def scores_alone(self, model):
        return [self.of_completion(logits, i) for i, logits in enumerate(self.logits_alone(model))]

    def of_completion(self, logits, i):
        return logits.log_softmax(-1).gather(-1, self.completions[i][:, None])[:, 0]


def recorded(model, monkeypatch):
    """Calls of `generate` note the logits that they drew from."""
    found = []
    generate = model.generate

    @functools.wraps(generate)
    def wrapper(**kwargs):
        output = generate(**kwargs, return_dict_in_generate=True, output_logits=True)
        found.append(torch.stack(output.logits, dim=1))
        return output.sequences

    monkeypatch.setattr(model, "generate", wrapper)
    return found


def assert_close(actual, expected):
    torch.testing.assert_close(actual.detach(), expected, atol=1e-4, rtol=1e-5)


def assert_all_close(actual, expected):
    for of_sample, alone in zip(actual, expected, strict=True):
        assert_close(of_sample[: len(alone)], alone)


TEXTS = ["say the word", "which colour is it say it not"]
ROWS = {
    "unpaired": [{"prompt": text, "completion": " red", "label": i == 0} for i, text in enumerate(TEXTS)],
    "pairs": [{"prompt": text, "chosen": " red", "rejected": " green blue"} for text in TEXTS],
    "prompts": [{"prompt": text} for text in TEXTS],
    "completions": [{"prompt": text, "completion": " red"} for text in TEXTS],
    "messages": [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "red"}]} for text in TEXTS
    ],
}
SAMPLING = {"max_completion_length": NUM_NEW_TOKENS, "generation_kwargs": GENERATION}
GROUPS = {**SAMPLING, "num_generations": 4, "per_device_train_batch_size": 8}
TRAINERS = {
    "sft": (SFTTrainer, SFTConfig, "completions", {}),
    "dpo": (DPOTrainer, DPOConfig, "pairs", {}),
    "kto": (KTOTrainer, KTOConfig, "unpaired", {}),
    "grpo": (GRPOTrainer, GRPOConfig, "prompts", GROUPS),
    "rloo": (RLOOTrainer, RLOOConfig, "prompts", GROUPS),
    "distillation": (DistillationTrainer, DistillationConfig, "prompts", SAMPLING),
    "gkd": (GKDTrainer, GKDConfig, "messages", {"max_new_tokens": NUM_NEW_TOKENS}),
}


def make_trainer(kind, name, model, folder):
    trainer_class, config_class, rows, options = TRAINERS[kind]
    options = {"per_device_train_batch_size": 2, "max_steps": 2, **options}
    of_trainer = {}
    if kind in ("grpo", "rloo"):
        of_trainer["reward_funcs"] = share_of_low_tokens
    if kind in ("distillation", "gkd"):
        of_trainer["teacher_model"] = make_model(family_of(name), "sdpa")
    tokenizer = make_processor().tokenizer
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
    trainer = trainer_class(
        model,
        args=config_class(**arguments(folder, **options)),
        train_dataset=Dataset.from_list(ROWS[rows] * 4),
        processing_class=tokenizer,
        **of_trainer,
    )
    return trainer


def sums(scores):
    return torch.stack([of_sample.sum() for of_sample in scores])


def summed_by(trainer):
    """The log-probabilities of the first sample and of the second one, as they were logged."""
    metrics = trainer._metrics["train"]
    return torch.tensor([metrics["logps/chosen"][-1], metrics["logps/rejected"][-1]])


def check_sft(trainer, rollout, scores):
    loss = trainer.compute_loss(trainer.model, {**rollout.batch, "labels": rollout.labels})
    assert_close(loss, -torch.cat(scores).mean())


def check_dpo(trainer, rollout, scores):
    """The first sample is the chosen one. The reference is the adapter at the start."""
    batch = {**rollout.batch, "completion_mask": rollout.is_completion}
    assert_close(torch.cat(trainer.compute_ref_log_probs(trainer.model, batch)), sums(scores))
    trainer.compute_loss(trainer.model, batch)
    assert_close(summed_by(trainer), sums(scores))


def check_kto(trainer, rollout, scores):
    """TRL's `compute_ref_log_probs` takes no images; the reference in its loss does."""
    batch = {**rollout.batch, "completion_mask": rollout.is_completion}
    for key, value in list(batch.items()):
        if value.shape == rollout.input_ids.shape:
            batch[f"KL_{key}"] = value
    batch["label"] = torch.tensor([True, False])
    assert_close(trainer._compute_kl_logps(trainer.model, batch), sums(scores))
    if not rollout.media:
        for of_reference in trainer.compute_ref_log_probs(trainer.model, batch):
            assert_close(of_reference, sums(scores))
    trainer.compute_loss(trainer.model, batch)
    assert_close(summed_by(trainer), sums(scores))
    assert trainer._metrics["train"]["rewards/chosen"][-1] == pytest.approx(0, abs=1e-4)


def check_per_token(trainer, rollout, scores):
    fields = dict(rollout.fields)
    if rollout.media:
        fields["num_images"] = [1, 1]
    inputs = (rollout.input_ids, rollout.attention_mask, rollout.completion_ids.shape[1])
    for batch_size in (2, 1):
        found = trainer._get_per_token_logps_and_entropies(trainer.model, *inputs, batch_size=batch_size, **fields)
        assert_all_close(found[0], scores)


def check_distillation(trainer, rollout, scores):
    model = trainer.model
    states = trainer._get_last_hidden_state(
        model, rollout.input_ids, rollout.attention_mask, rollout.completion_ids.shape[1], **rollout.fields
    )
    logits = model.get_output_embeddings()(states)
    lengths = map(len, rollout.completions)
    found = [rollout.of_completion(logits[i, :length], i) for i, length in enumerate(lengths)]
    assert_all_close(found, scores)

    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    loss = trainer.compute_loss(model, {**{name: getattr(rollout, name) for name in names}, **rollout.fields})
    student, teacher = (
        torch.cat(rollout.logits_alone(of)).log_softmax(-1) for of in (model.eval(), trainer.teacher_model)
    )
    assert_close(loss, (student.exp() * (student - teacher)).sum(-1).mean())


def check_gkd(trainer, rollout, scores):
    batch = {"input_ids": rollout.input_ids, "attention_mask": rollout.attention_mask, "labels": rollout.labels}
    loss = trainer.compute_loss(trainer.model, batch)
    student, teacher = (
        torch.cat(rollout.logits_alone(of)).log_softmax(-1) for of in (trainer.model.eval(), trainer.teacher_model)
    )
    mixture = ((student.exp() + teacher.exp()) / 2).log()
    divergences = [F.kl_div(mixture, of, reduction="none", log_target=True) for of in (student, teacher)]
    assert_close(loss, sum(divergences).sum(-1).mean() / 2)


SCORES = {
    "sft": check_sft,
    "dpo": check_dpo,
    "kto": check_kto,
    "grpo": check_per_token,
    "rloo": check_per_token,
    "distillation": check_distillation,
    "gkd": check_gkd,
}


def sample(kind, trainer, prompts, fields):
    """Completions, which trainers that sample draw themselves."""
    torch.manual_seed(7)
    if kind == "grpo":
        return trainer._generate_single_turn(prompts, None, fields, num_generations=1)[0]
    if kind in ("rloo", "distillation"):
        return trainer._generate_single_turn(prompts, None, fields)
    inputs = Rollout(prompts, fields, [[], []]).batch
    options = {"max_new_tokens": NUM_NEW_TOKENS, "do_sample": True, "disable_compile": True, **GENERATION}
    sequences = trainer.model.generate(**inputs, **options)
    return sequences[:, -NUM_NEW_TOKENS:].tolist()


# GKDTrainer hands no images to the models.
CASES = [(kind, images) for kind in TRAINERS for images in (False, True) if not (kind == "gkd" and images)]


@pytest.mark.parametrize("method", ["m2pt", "lora"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "kind, images", CASES, ids=[f"{kind}-{'images' if images else 'text'}" for kind, images in CASES]
)
def test_scores(kind, images, name, method, tmp_path, monkeypatch):
    model = make_tuned(name, method)
    trainer = make_trainer(kind, name, model, tmp_path)
    logits = recorded(model, monkeypatch)
    prompts, fields = make_prompts(name, images)
    model.eval()
    rollout = Rollout(prompts, fields, sample(kind, trainer, prompts, fields))
    alone = rollout.scores_alone(model)
    lengths = map(len, rollout.completions)
    assert_all_close([rollout.of_completion(logits[0][i, :length], i) for i, length in enumerate(lengths)], alone)
    with model.disable_adapter():
        assert (torch.cat(rollout.scores_alone(model)) - torch.cat(alone)).abs().max() > 0.1
    model.train()
    SCORES[kind](trainer, rollout, alone)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", TRAINERS)
def test_training(kind, name, tmp_path):
    trainer = make_trainer(kind, name, make_tuned(name), tmp_path)
    before = snapshot(trainer.model)
    trainer.train()
    moved = {key for key, value in trainer.model.named_parameters() if not torch.equal(value, before[key])}
    trained = {key for key, value in trainer.model.named_parameters() if value.requires_grad}
    of_text = {key for key in trained if "language_model" in key and "m2pt_prompt" in key}
    assert of_text and of_text <= moved <= trained
