"""
Tunes multimodal prompts on your own conversations about images and videos.

    python examples/train.py examples/train.yaml --train_data my.json --output_dir my-adapter

Options are those of `TrainingArguments` and of the classes below, in a YAML or JSON file, as flags, or both; flags
win. `conversations.py` reads the data, `answers.py` makes batches and scores answers. See docs/training-your-data.md.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from answers import AnswerCollator, AnsweringTrainer, Scores
from conversations import BAD_IMAGES, Conversations, ImageReader, StreamedConversations, is_file, kinds_of, load
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    HfArgumentParser,
    PreTrainedModel,
    ProcessorMixin,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from peft_m2pt import M2PTConfig, adapt_processor


def option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


def prompt_option(name: str) -> Any:
    """An option with the default and the help of `M2PTConfig`."""
    original = M2PTConfig.__dataclass_fields__[name]
    return field(default=original.default, metadata=dict(original.metadata))


@dataclass
class ModelArguments:
    model_name_or_path: str | None = option(None, "The model: a folder or a Hub id.")
    revision: str = option("main", "Its revision.")
    trust_remote_code: bool = option(False, "Run code that comes with the model.")
    attn_implementation: str = option("sdpa", "The attention implementation, such as 'sdpa' or 'eager'.")
    load_in_4bit: bool = option(False, "Quantize the model to 4 bits.")
    chat_template: str | None = option(None, "File with a chat template to use instead of the processor's.")

    def __post_init__(self) -> None:
        if self.model_name_or_path is None:
            raise ValueError("There is no model to tune. Set model_name_or_path.")


@dataclass
class DataArguments:
    train_data: str | None = option(None, "A JSON, JSON Lines or parquet file, a pattern, or a dataset on the Hub.")
    train_split: str = option("train", "The split of a Hub dataset to train on.")
    eval_data: str | None = option(None, "The same, for evaluation.")
    eval_split: str = option("test", "The split of a Hub dataset to evaluate on.")
    eval_size: int = option(0, "Without eval_data: how many training samples to hold out for evaluation.")
    image_folder: str | None = option(None, "Folder of image paths. By default, that of the data.")
    bad_images: str = option("error", f"What to do about unreadable images, one of {BAD_IMAGES}.")
    streaming: bool = option(False, "Stream training data. Needs max_steps.")
    shuffle_buffer: int = option(1000, "Buffer size for shuffling streamed samples.")
    max_length: int | None = option(None, "Truncate conversations to this many tokens, including those of images.")
    max_new_tokens: int = option(64, "Maximum length of answers in the evaluation, in tokens.")

    def __post_init__(self) -> None:
        if self.train_data is None:
            raise ValueError("There is nothing to train on. Set train_data.")
        if self.bad_images not in BAD_IMAGES:
            raise ValueError(f"bad_images={self.bad_images!r} is unknown. Choose one of {BAD_IMAGES}.")

    def image_reader(self, report: Path, kinds: list[str]) -> ImageReader:
        folder = self.image_folder or (Path(self.train_data).parent if is_file(self.train_data) else None)
        return ImageReader(folder and Path(folder), self.bad_images, report, kinds)


@dataclass
class PromptArguments:
    num_visual_tokens: int = prompt_option("num_visual_tokens")
    num_textual_tokens: int = prompt_option("num_textual_tokens")
    num_interaction_tokens: int | None = prompt_option("num_interaction_tokens")
    interaction_placement: str = prompt_option("interaction_placement")
    tune_connector: bool = prompt_option("tune_connector")
    connector_rank: str | None = prompt_option("connector_rank")
    visual_layers: list[str] | None = prompt_option("visual_layers")
    textual_layers: list[str] | None = prompt_option("textual_layers")
    init_prompts: str = prompt_option("init_prompts")
    init_text: str | None = prompt_option("init_text")
    exclude_modules: list[str] | None = prompt_option("exclude_modules")
    modules_to_save: list[str] | None = prompt_option("modules_to_save")

    def config(self) -> M2PTConfig:
        """Returns the configuration of the adapter."""
        values = dataclasses.asdict(self)
        for name in ("visual_layers", "textual_layers"):
            values[name] = as_layers(values[name])
        values["connector_rank"] = as_rank(values["connector_rank"])
        return M2PTConfig(**values)


def as_layers(values: list[str] | str | None) -> list[int | str] | str | None:
    """Turns values from a command line or file into layer indices or the name of a placement."""
    if values is None or isinstance(values, str):
        return values
    layers = [int(value) if str(value).removeprefix("-").isdigit() else value for value in values]
    return layers[0] if len(layers) == 1 and isinstance(layers[0], str) else layers


def as_rank(value: int | str | None) -> int | str | None:
    """Turns a value from a command line or file into `connector_rank`. "none": a full copy."""
    return {"none": None}.get(str(value).lower(), int(value) if str(value).isdigit() else value)


@dataclass
class RunArguments(TrainingArguments):
    """`TrainingArguments` with the paper's recipe as defaults, and the learning rate for our initialization."""

    learning_rate: float = option(3e-3, "Learning rate of prompts and connector. The paper's is 7e-4.")
    lr_scheduler_type: str = option("cosine", "Learning rate schedule.")
    warmup_steps: float = option(0.03, "Warmup steps; below 1, their share of all steps.")
    resume_from_checkpoint: str | None = option(None, "A checkpoint, or 'last': the last one in output_dir, if any.")
    remove_unused_columns: bool = option(False, "Must be False: samples are not columns.")

    def __post_init__(self) -> None:
        super().__post_init__()
        # One process cannot dispatch batches with images of different sizes to the others.
        self.accelerator_config.dispatch_batches = False


def parse(arguments: list[str]) -> tuple[ModelArguments, DataArguments, PromptArguments, RunArguments]:
    """
    Reads options from flags and, if the first argument is not a flag, from a YAML or JSON file.

    Raises:
        ValueError: If the file has an unknown option.
    """
    parser = HfArgumentParser([ModelArguments, DataArguments, PromptArguments, RunArguments])
    if arguments and not arguments[0].startswith("-"):
        path, *arguments = arguments
        options = yaml.safe_load(Path(path).read_text())
        if not isinstance(options, dict):
            raise ValueError(f"{path} does not hold options, lines such as 'learning_rate: 7e-4'.")
        names = [action.dest for action in parser._actions]
        for name in options:
            if name not in names:
                guess = "".join(f" Is it {similar!r}?" for similar in difflib.get_close_matches(name, names, 1))
                raise ValueError(f"{path} has an unknown option {name!r}.{guess}")
        parser.set_defaults(**options)
    return parser.parse_args_into_dataclasses(arguments)


def load_processor(arguments: ModelArguments, config: M2PTConfig) -> ProcessorMixin:
    processor = AutoProcessor.from_pretrained(
        arguments.model_name_or_path, revision=arguments.revision, trust_remote_code=arguments.trust_remote_code
    )
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(f"{arguments.model_name_or_path} has no processor for images and text.")
    if arguments.chat_template is not None:
        processor.chat_template = Path(arguments.chat_template).read_text()
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return adapt_processor(processor, config) if config.interaction_placement == "image" else processor


def load_model(arguments: ModelArguments, config: M2PTConfig, run: RunArguments) -> PeftModel:
    """Loads the frozen model and adds prompts."""
    dtype = torch.bfloat16 if run.bf16 else torch.float16 if run.fp16 else torch.float32
    options: dict[str, Any] = {}
    if arguments.load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
        options["device_map"] = {"": PartialState().device}
    model: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(
        arguments.model_name_or_path,
        revision=arguments.revision,
        trust_remote_code=arguments.trust_remote_code,
        attn_implementation=arguments.attn_implementation,
        dtype=dtype,
        **options,
    )
    if arguments.load_in_4bit:
        model = prepare_model_for_kbit_training(model, run.gradient_checkpointing, run.gradient_checkpointing_kwargs)
    return get_peft_model(model, config)


def load_data(arguments: DataArguments, run: RunArguments, reader: ImageReader) -> tuple[Any, Conversations | None]:
    """
    Loads the training data and the evaluation data, if any.

    Raises:
        ValueError: If the options do not fit together.
    """
    if arguments.streaming and run.max_steps <= 0:
        raise ValueError("streaming=True needs max_steps, since nobody knows how many samples there will be.")
    seed = run.seed if run.data_seed is None else run.data_seed
    with run.main_process_first():
        rows = load(arguments.train_data, arguments.train_split, arguments.streaming)
        questions = None
        if arguments.eval_data is not None:
            questions = load(arguments.eval_data, arguments.eval_split, streaming=False)
    if questions is None and arguments.eval_size > 0:
        if arguments.streaming:
            questions, rows = list(rows.take(arguments.eval_size)), rows.skip(arguments.eval_size)
        else:
            rows, questions = rows.train_test_split(test_size=arguments.eval_size, seed=seed).values()
    if questions is not None:
        questions = Conversations(questions, reader, ask=True)
    if arguments.streaming:
        return StreamedConversations(rows.shuffle(seed, buffer_size=arguments.shuffle_buffer), reader), questions
    return Conversations(rows, reader), questions


def find_checkpoint(run: RunArguments) -> str | None:
    """
    Returns the checkpoint to start from.

    Raises:
        ValueError: If the output folder has checkpoints of an earlier run, and resume_from_checkpoint is not set.
    """
    last = get_last_checkpoint(run.output_dir) if Path(run.output_dir).is_dir() else None
    if run.resume_from_checkpoint is None and last is not None:
        raise ValueError(
            f"{last} is of an earlier run. Set resume_from_checkpoint=last to go on with it, or choose another "
            f"output_dir."
        )
    return last if run.resume_from_checkpoint == "last" else run.resume_from_checkpoint


def main() -> None:
    logging.basicConfig(format="%(message)s")
    model_arguments, data_arguments, prompt_arguments, run = parse(sys.argv[1:])
    checkpoint = find_checkpoint(run)
    config = prompt_arguments.config()
    processor = load_processor(model_arguments, config)
    reader = data_arguments.image_reader(Path(run.output_dir, "bad_images.jsonl"), kinds_of(processor))
    if checkpoint is None and run.process_index == 0:
        reader.report.unlink(missing_ok=True)
    set_seed(run.seed)  # for the initial prompts
    train_data, eval_data = load_data(data_arguments, run, reader)
    model = load_model(model_arguments, config, run)
    placeholders = {kind: getattr(model.config, f"{kind}_token_id", None) for kind in kinds_of(processor)}
    placeholders = {kind: token for kind, token in placeholders.items() if token is not None}
    trainer = AnsweringTrainer(
        model=model,
        args=run,
        train_dataset=train_data,
        eval_dataset=eval_data,
        data_collator=AnswerCollator(processor, model.generation_config, placeholders, data_arguments.max_length),
        processing_class=processor,
        compute_metrics=None if eval_data is None else Scores(eval_data, processor),
        max_new_tokens=data_arguments.max_new_tokens,
    )
    if trainer.is_world_process_zero():
        print(model.base_model.describe())

    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("train", result.metrics)
    if eval_data is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if trainer.is_world_process_zero():
        num_bad = len(reader.reports())
        print(f"Images that could not be read: {num_bad}" + f" (see {reader.report})" * bool(num_bad))
    if run.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
