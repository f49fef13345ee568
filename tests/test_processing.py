"""Processors that leave room for interaction prompts."""

import copy

import pytest
import torch
from helpers.models import IMAGE_TOKEN, NUM_PATCHES, adapt, make_config, make_llava
from helpers.processors import make_processor
from transformers import AutoProcessor, ProcessorMixin

from peft_m2pt import M2PTConfig, adapt_processor


IMAGE = {"interaction_placement": "image"}
NUM_INTERACTION = 2


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
