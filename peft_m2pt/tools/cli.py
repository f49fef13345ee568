"""The command `peft-m2pt`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..bundles.bundler import bundle
from ..convert.converter import convert_checkpoint
from .environment import describe_environment
from .inspection import inspect_model
from .running import find_program, find_server


INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs the command.

    Args:
        argv (`Sequence[str]`, *optional*):
            The arguments. `None` (default) for those of the process.

    Returns:
        `int`: The exit code.
    """
    arguments = _make_parser().parse_args(argv)
    try:
        program = arguments.run(arguments)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    # Outside of `try`: errors of a program started by `run` are its own.
    if program is not None:
        program()
    return 0


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="peft-m2pt", description="Multimodal Prompt Tuning (M2PT) as a PEFT method.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    convert = commands.add_parser(
        "convert",
        help="convert a checkpoint of the official M2PT code",
        description="Converts a checkpoint of the official M2PT code to a LLaVA of transformers with its processor "
        "(OUTPUT/base) and an M2PT adapter (OUTPUT/adapter).",
    )
    convert.add_argument(
        "original", type=Path, metavar="ORIGINAL", help="folder saved by the official code: config and weights"
    )
    convert.add_argument(
        "--language-model",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the Llama base model: config, tokenizer, and the weights that ORIGINAL lacks",
    )
    convert.add_argument(
        "--vision-tower",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the CLIP base model: config, image processor, and the weights that ORIGINAL lacks",
    )
    convert.add_argument("--output", type=Path, required=True, metavar="OUTPUT", help="folder to write, new or empty")
    convert.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="size of the largest file to write (default: 5GB)"
    )
    convert.set_defaults(run=_convert)

    bundle = commands.add_parser(
        "bundle",
        help="make one folder of a base model and an adapter, for serving",
        description="Makes one folder of a base model and an M2PT adapter, for programs that load a model by name "
        "with the auto classes of transformers. BASE and ADAPTER are folders or model ids on the Hub.",
    )
    bundle.add_argument("base", metavar="BASE", help="the base model")
    bundle.add_argument("adapter", metavar="ADAPTER", help="the M2PT adapter")
    bundle.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write, new or empty")
    bundle.add_argument(
        "--copy", action="store_true", help="copy the files of the base model instead of linking to them"
    )
    bundle.add_argument(
        "--revision",
        metavar="REVISION",
        help="branch, tag or commit of BASE (default: the one in the config of the adapter)",
    )
    bundle.add_argument("--adapter-revision", metavar="REVISION", help="branch, tag or commit of ADAPTER")
    bundle.add_argument("--adapter-subfolder", metavar="NAME", help="folder of the adapter in ADAPTER")
    bundle.set_defaults(run=_bundle)

    serve = commands.add_parser(
        "serve",
        help="serve a bundle with the server of transformers",
        description="Serves a bundle with `transformers serve`, through an OpenAI-compatible API.",
    )
    serve.add_argument("bundle", type=Path, metavar="DIR", help="folder made by `peft-m2pt bundle`")
    serve.add_argument(
        "arguments",
        metavar="ARGUMENTS",
        nargs=argparse.REMAINDER,
        help="arguments of `transformers serve`, such as --port 8000",
    )
    serve.set_defaults(run=_serve)

    inspect = commands.add_parser(
        "inspect",
        help="show what M2PT finds in a model",
        description="Shows what M2PT finds in a model (towers, layers, attention, norms, positions, connector), and "
        "what M2PTConfig() would train. No weights are loaded: a config is enough.",
    )
    inspect.add_argument(
        "model", metavar="MODEL_OR_CONFIG", help="folder with a config.json, such a file, or a model id on the Hub"
    )
    inspect.set_defaults(run=_inspect)

    env = commands.add_parser(
        "env",
        help="show versions and platform, for a bug report",
        description="Shows versions and platform, and whether M2PT was tested with them. With a model, also which "
        "attention implementation transformers chooses for its parts. No weights are loaded.",
    )
    env.add_argument(
        "model",
        nargs="?",
        metavar="MODEL_OR_CONFIG",
        help="folder with a config.json, such a file, or a model id on the Hub",
    )
    env.set_defaults(run=_env)

    run = commands.add_parser(
        "run",
        help="run another program with M2PT registered, so that it can load M2PT adapters",
        description="Runs another program in this process, with M2PT registered, so that it can load M2PT adapters "
        "without importing peft_m2pt. Processes started by it have to import peft_m2pt themselves.",
    )
    run.add_argument("program", metavar="PROGRAM", help="console script, module, or file ending in .py")
    run.add_argument("arguments", metavar="ARGUMENTS", nargs=argparse.REMAINDER, help="its arguments")
    run.set_defaults(run=_run)
    return parser


def _convert(arguments: argparse.Namespace) -> None:
    config = convert_checkpoint(
        arguments.original,
        arguments.language_model,
        arguments.vision_tower,
        arguments.output,
        max_shard_size=arguments.max_shard_size,
        progressbar=sys.stderr.isatty(),
    )
    print(
        f"{arguments.output} is complete: {config.num_visual_tokens} visual and {config.num_textual_tokens} textual "
        f"prompts per layer, {config.num_interaction_tokens} interaction prompts."
    )


def _bundle(arguments: argparse.Namespace) -> None:
    bundle(
        arguments.base,
        arguments.adapter,
        arguments.output,
        revision=arguments.revision,
        adapter_revision=arguments.adapter_revision,
        adapter_subfolder=arguments.adapter_subfolder,
        copy=arguments.copy,
    )
    print(f"{arguments.output} is complete; its README.md says how to load and serve it.")


def _serve(arguments: argparse.Namespace) -> Callable[[], Any]:
    return find_server(arguments.bundle, arguments.arguments)


def _inspect(arguments: argparse.Namespace) -> None:
    print(inspect_model(arguments.model))


def _env(arguments: argparse.Namespace) -> None:
    print(describe_environment(arguments.model))


def _run(arguments: argparse.Namespace) -> Callable[[], Any]:
    return find_program(arguments.program, arguments.arguments)
