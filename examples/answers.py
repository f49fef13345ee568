"""Training a vision-language model on the answers in conversations, and scoring the answers that it gives itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

import torch
from conversations import Conversations
from transformers import BatchFeature, EvalPrediction, GenerationConfig, ProcessorMixin, Trainer
from transformers.integrations import is_deepspeed_zero3_enabled


IGNORED = -100
PROBE = [
    {"role": "user", "content": [{"type": "text", "text": "question"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "answer"}]},
]


def common_length(first: Sequence, second: Sequence) -> int:
    """Returns how long two sequences are the same."""
    return next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))


def text_of(message: dict[str, Any]) -> str:
    """Returns the last text of a message, which in an answer is all of it."""
    return next((part["text"] for part in reversed(message["content"]) if part["type"] == "text"), "")


class AnswerCollator:
    """
    Encodes conversations with the chat template of a processor.

    Conversations that end with an answer become a batch for training, with labels on each answer up to and including
    the token that ends it. Where a template ends answers with none, the end-of-sequence token is added. Conversations
    that end with a question become prompts, padded on the left, for generation.

    Args:
        processor (`ProcessorMixin`):
            The processor.
        generation_config (`GenerationConfig`):
            Says which tokens end an answer.
        placeholders (`dict[str, int]`, *optional*):
            The tokens that stand for an "image" and a "video".
        max_length (`int`, *optional*):
            Cuts batches for training to this length.

    Raises:
        ValueError: If the processor has no chat template or no token to end an answer with.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        generation_config: GenerationConfig,
        placeholders: dict[str, int] | None = None,
        max_length: int | None = None,
    ) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.placeholders = placeholders or {}
        self.max_length = max_length
        if processor.chat_template is None:
            raise ValueError(f"The {type(processor).__name__} of this model has no chat template. Set chat_template.")
        end = generation_config.eos_token_id
        self.end_tokens = {self.tokenizer.eos_token_id, *(end if isinstance(end, list) else [end])} - {None}
        self.end = ""
        _, _, behind = self.render(PROBE).partition("answer")
        if not self.end_tokens.intersection(self.tokenizer(behind, add_special_tokens=False)["input_ids"]):
            if self.tokenizer.eos_token is None:
                raise ValueError(
                    "Neither the chat template nor the tokenizer of this model has a token to end answers."
                )
            self.end = self.tokenizer.eos_token

    def __call__(self, samples: list[dict[str, Any]]) -> BatchFeature:
        if samples[0]["messages"][-1]["role"] != "assistant":
            prompts = [self.render(sample["messages"], add_generation_prompt=True) for sample in samples]
            batch = self.encode(prompts, samples, padding_side="left")
            batch["index"] = torch.tensor([sample["index"] for sample in samples])
            return batch
        texts = [self.render(sample["messages"]) for sample in samples]
        batch = self.encode(texts, samples, padding_side="right")
        batch["labels"] = torch.full_like(batch["input_ids"], IGNORED)
        for i, (sample, text) in enumerate(zip(samples, texts)):
            tokens = batch["input_ids"][i, : batch["attention_mask"][i].sum()].tolist()
            for start, end in self.find_answers(sample, text, tokens):
                batch["labels"][i, start:end] = batch["input_ids"][i, start:end]
        return batch if self.max_length is None else self.cut(batch)

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        """Writes a conversation as text."""
        messages = [
            {**message, "content": [{"type": "text", "text": text_of(message) + self.end}]}
            if message["role"] == "assistant"
            else message
            for message in messages
        ]
        return self.processor.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)

    def encode(self, texts: list[str], samples: list[dict[str, Any]], padding_side: str) -> BatchFeature:
        """
        Turns texts into a batch, with the images and videos of their samples.

        Raises:
            ValueError: If the processor does not take as many of them, or the chat template leaves some out.
        """
        images = [sample["images"] for sample in samples]
        videos = [video for sample in samples for video in sample["videos"]]
        try:
            batch = self.processor(
                text=texts,
                images=images if any(images) else None,
                **({"videos": videos} if videos else {}),
                padding=True,
                padding_side=padding_side,
                return_tensors="pt",
                add_special_tokens=self.adds_special_tokens(texts[0]),
            )
        except Exception as error:
            numbers = [(len(sample["images"]), len(sample["videos"])) for sample in samples]
            raise ValueError(
                f"The {type(self.processor).__name__} of this model makes no batch of samples with so many images and "
                f"videos, {numbers}: {error}"
            ) from error
        for sample, tokens in zip(samples, batch["input_ids"]):
            for kind, token in self.placeholders.items():
                if sample[f"{kind}s"] and not (tokens == token).any():
                    raise ValueError(
                        f"The chat template of this model leaves {kind}s out. Set chat_template to another one."
                    )
        return batch

    def adds_special_tokens(self, text: str) -> bool:
        """Whether the tokenizer has to begin a text, as most templates do themselves."""
        begin = self.tokenizer.bos_token
        return begin is None or not text.startswith(begin)

    def tokenize(self, text: str) -> list[int]:
        """Turns a text into tokens, without making room for images."""
        return self.tokenizer(text, add_special_tokens=self.adds_special_tokens(text))["input_ids"]

    def find_answers(self, sample: dict[str, Any], text: str, tokens: list[int]) -> Iterator[tuple[int, int]]:
        """
        Finds the answers in a conversation.

        Args:
            sample (`dict[str, Any]`):
                The conversation and its images.
            text (`str`):
                The conversation as text.
            tokens (`list[int]`):
                What the processor has made of it.

        Returns:
            `Iterator[tuple[int, int]]`: Where each answer starts, and the place behind the token that ends it.

        Raises:
            ValueError: If the text is not made of the messages, one after the other.
        """
        messages = sample["messages"]
        plain = self.tokenize(text)
        place = 0  # in the text, behind the messages so far
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                # In front of an answer to come, a template may write more than in front of one that is there.
                prompt = self.render(messages[:i], add_generation_prompt=True)
                prompt = prompt[: common_length(prompt, text)]
                self.check(len(prompt) >= place, text)
                place = len(prompt)
                plain_start = common_length(self.tokenize(prompt), plain)
                start = self.count_tokens(prompt, sample, messages[i:], plain[plain_start:], tokens)
                end = next((j for j in range(start, len(tokens)) if tokens[j] in self.end_tokens), None)
                self.check(end is not None, text)
                self.check(tokens[start : end + 1] == plain[plain_start : plain_start + end + 1 - start], text)
                yield start, end + 1
            found = text.find(text_of(message), place)
            self.check(found >= 0, text)
            place = found + len(text_of(message))

    def check(self, is_as_expected: bool, text: str) -> None:
        if not is_as_expected:
            raise ValueError(
                f"The chat template of this model does not write messages as they are, one after the other, so that "
                f"answers cannot be found in what it writes: {text!r}. Set chat_template to another one."
            )

    def count_tokens(
        self, prompt: str, sample: dict[str, Any], later: list[dict[str, Any]], rest: list[int], tokens: list[int]
    ) -> int:
        """Returns how many of the tokens of a conversation belong to the prompt in front of an answer."""
        # Behind the last image, the tokens of the processor are those of the tokenizer, so count from the end.
        if tokens[-len(rest) :] == rest:
            return len(tokens) - len(rest)
        # How many tokens an image takes may depend on how many there are, so those of later turns are shown too.
        content = [part for message in later for part in message["content"] if part["type"] != "text"]
        prompt += self.render([{"role": "user", "content": content}])
        return common_length(self.encode([prompt], [sample], padding_side="right")["input_ids"][0].tolist(), tokens)

    def cut(self, batch: BatchFeature) -> BatchFeature:
        """Cuts a batch to the greatest length."""
        shape = batch["input_ids"].shape
        behind = batch["input_ids"][:, self.max_length :]
        for kind, token in self.placeholders.items():
            if (behind == token).any():
                what = "an image" if kind == "image" else "a video"
                raise ValueError(
                    f"max_length={self.max_length} cuts {what} apart, in a batch of {shape[1]} tokens, those of "
                    f"{kind}s included. Set a higher one."
                )
        for name, value in batch.items():
            if value.shape[:2] == shape:
                batch[name] = value[:, : self.max_length]
        return batch


class AnsweringTrainer(Trainer):
    """
    A `Trainer` that evaluates a model by the answers that it gives.

    Args:
        max_new_tokens (`int`):
            The greatest length of an answer.
    """

    def __init__(self, *args: Any, max_new_tokens: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.max_new_tokens = max_new_tokens

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        inputs = dict(self._prepare_inputs(inputs))
        index = inputs.pop("index")
        with torch.no_grad(), self.compute_loss_context_manager():
            tokens = self.accelerator.unwrap_model(self.model).generate(
                **inputs,
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                synced_gpus=is_deepspeed_zero3_enabled() or self.is_fsdp_enabled,
            )
        return None, tokens[:, inputs["input_ids"].shape[1] :].contiguous(), index


class Scores:
    """
    The share of answers that are exactly right: of all, and for each task.

    Args:
        samples ([`Conversations`]):
            The questions.
        processor (`ProcessorMixin`):
            The processor.
    """

    def __init__(self, samples: Conversations, processor: ProcessorMixin) -> None:
        self.samples = samples
        self.processor = processor

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        right: dict[int, bool] = {}  # A sample may have come twice, in place of one that cannot be read.
        for index, tokens in zip(prediction.label_ids.tolist(), prediction.predictions.tolist()):
            tokens = [token for token in tokens if token != IGNORED]
            answer = self.processor.tokenizer.decode(tokens, skip_special_tokens=True)
            right[index] = answer.strip() == self.samples.answer(index)
        tasks = defaultdict(list)
        for index, is_right in right.items():
            tasks[self.samples.task(index)].append(is_right)
        scores = {f"exact_match/{task}": fmean(hits) for task, hits in tasks.items() if task is not None}
        return {"exact_match": fmean(right.values()), "num_answers": len(right), **dict(sorted(scores.items()))}
