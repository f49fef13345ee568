"""A model that answers questions about pictures, and learns to."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from transformers import Cache, DynamicCache, LlavaForConditionalGeneration, PreTrainedTokenizerBase

from .tasks import Pictures, Template


class Learner:
    """
    A LLaVA, adapted or not, whose parts are called one by one: answers alone have logits, the encoder is not asked
    again where its answer is known, and what stands before a question is read once for all questions.

    Args:
        model (`LlavaForConditionalGeneration`):
            The model itself.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        template (`Template`):
            How conversations are written.
        adapted (`nn.Module`, *optional*):
            What a method made of the model, if it put something around it.
    """

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        adapted: nn.Module | None = None,
    ) -> None:
        self.model = model
        self.device = model.device
        self.tokenizer = tokenizer
        self.template = template
        # Nothing here has dropout, and frozen towers are to stay as they are.
        self.adapted = (model if adapted is None else adapted).eval()
        self.trained = {n: p for n, p in self.adapted.named_parameters() if p.requires_grad}
        self.sees_anew = any("vision_tower" in name for name in self.trained)
        config = getattr(self.adapted, "active_peft_config", None)
        kind = config.peft_type.value if config is not None and config.is_prompt_learning else None
        self.has_prefix, self.has_prompt = kind == "PREFIX_TUNING", kind == "PROMPT_TUNING"

    def ids(self, text: str) -> torch.Tensor:
        """The tokens of a text, without those that a tokenizer adds: `(number,)`."""
        return self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0].long().to(self.device)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model.get_input_embeddings()(ids)

    def prepare(self, pictures: Pictures) -> Pictures:
        """Pictures as they are needed: features for the connector, if training does not change those."""
        pictures = replace(pictures, images=pictures.images.to(self.device))
        if self.sees_anew:
            return pictures
        with torch.no_grad():
            features = [self.features(part) for part in pictures.images.split(100)]
        return replace(pictures, images=torch.cat(features))

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """What the connector reads of images."""
        tower = self.model.model.vision_tower
        dtype = next(tower.parameters()).dtype
        states = tower(pixel_values.to(dtype), output_hidden_states=True).hidden_states
        return states[self.model.config.vision_feature_layer][:, 1:].float()

    def opening(self, images: torch.Tensor | None, num_samples: int) -> torch.Tensor:
        """
        Embeddings of all that stands before a question.

        Args:
            images (`torch.Tensor`, *optional*):
                What [`~Learner.prepare`] makes of pictures. `None`: there is no image.
            num_samples (`int`):
                The size of the batch.
        """
        parts = [self.embed(self.ids(self.template.opening)).expand(num_samples, -1, -1)]
        if images is not None:
            features = self.features(images) if self.sees_anew else images
            parts.append(self.model.model.multi_modal_projector(features).to(parts[0].dtype))
        if self.has_prompt:
            parts.insert(0, self.adapted.get_prompt(num_samples))
        return torch.cat(parts, dim=1)

    def read(self, embeddings: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """What the language model makes of embeddings, behind what a cache holds."""
        return self.model.model.language_model(
            inputs_embeds=embeddings, past_key_values=cache, use_cache=cache is not None
        ).last_hidden_state

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits of states, in float32."""
        # Of rows that do not lie side by side, bfloat16 on CPUs takes a hundred times as long.
        return self.model.lm_head(states.contiguous()).float()

    def empty_cache(self, num_samples: int) -> Cache:
        """The cache in front of everything: empty, or with a prefix that is trained."""
        return self.adapted.get_prompt(num_samples) if self.has_prefix else DynamicCache()

    def look(self, images: torch.Tensor | None, num_samples: int) -> Cache:
        """Reads all that stands before a question."""
        cache = self.empty_cache(num_samples)
        self.read(self.opening(images, num_samples), cache)
        return cache

    def answer_logits(
        self, images: torch.Tensor, items: list[tuple[str, str]]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Logits of the tokens of answers, the tokens themselves, and the sample that each belongs to.

        Args:
            images (`torch.Tensor`):
                What [`~Learner.prepare`] makes of pictures.
            items (`list[tuple[str, str]]`):
                A question and its answer about each.
        """
        questions = [self.ids(self.template.question.format(question)) for question, _ in items]
        answers = [self.ids(self.template.answer.format(answer)) for _, answer in items]
        rows = [torch.cat(pair) for pair in zip(questions, answers)]
        # Nothing sees what stands behind it, so padding may be anything.
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        positions = torch.arange(ids.shape[1], device=self.device)
        starts, ends = (
            torch.tensor([len(row) for row in part], device=self.device)[:, None] for part in (questions, rows)
        )
        answered = ((positions >= starts) & (positions < ends))[:, 1:]
        cache = self.empty_cache(len(items)) if self.has_prefix else None
        embeddings = torch.cat([self.opening(images, len(items)), self.embed(ids)], dim=1)
        states = self.read(embeddings, cache)[:, -ids.shape[1] : -1]
        return self.logits(states[answered]), ids[:, 1:][answered], answered.nonzero()[:, 0]

    def judge(self, cache: Cache, question: str, candidates: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """
        How likely each candidate is as the answer to a question. The question is read once.

        Args:
            cache (`Cache`):
                What was read before the question. It is afterwards as it was.
            question (`str`):
                The question.
            candidates (`list[str]`):
                Answers.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: log-probabilities, and whether greedy decoding gives exactly this
            answer, both `(num_samples, num_candidates)`.
        """
        before = cache.get_seq_length()
        num_samples = cache.layers[0].keys.shape[0]

        def read(ids: torch.Tensor) -> torch.Tensor:
            return self.read(self.embed(ids).expand(num_samples, -1, -1), cache)

        last = self.logits(read(self.ids(self.template.question.format(question)))[:, -1:])
        behind = cache.get_seq_length()
        likelihoods, greedy = [], []
        for candidate in candidates:
            ids = self.ids(self.template.answer.format(candidate))
            logits = torch.cat([last, self.logits(read(ids[:-1]))], dim=1)
            cache.crop(1 - len(ids))
            chosen = logits.log_softmax(-1)[:, range(len(ids)), ids]
            likelihoods.append(chosen.sum(1))
            greedy.append((logits.argmax(-1) == ids).all(1))
        cache.crop(before - behind)
        return torch.stack(likelihoods, dim=1).cpu(), torch.stack(greedy, dim=1).cpu()
