"""The ``gpt2`` command: a table from the name of each command to one typed function."""

import argparse
import gc
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from gpt2_lightning import __version__

COMMANDS = {
    "fit": ("cli.fit", "train from a recipe: --config configs/quickstart.yaml"),
    "validate": ("cli.fit", "validation loss and HellaSwag of a checkpoint: --config … --ckpt_path …"),
    "prepare": ("cli.commands", "tokenize documents into shards"),
    "generate": ("cli.commands", "sample text from a model"),
    "hellaswag": ("cli.commands", "score a model on HellaSwag"),
    "export": ("cli.commands", "write weights for transformers or llm.c"),
    "plan": ("cli.fit", "parameters, memory, time and cost of a recipe: --config … [--gpu h100 --gpus 8]"),
    "bench": ("cli.commands", "the video's speed ladder on this machine"),
    "report": ("cli.commands", "curves, figures and samples of runs on one page"),
}
"""Name → (the module that holds the function of that name, help). The module is imported when its command runs."""


def main(args: Sequence[str] | None = None) -> int:
    """Run ``gpt2 ARGS``.

    Returns:
        The exit code: 0, 1 for an error of the user's, 2 for wrong usage, 130 for Ctrl-C, 128 + n for signal n.
    """
    args = list(sys.argv[1:] if args is None else args)
    parser = argparse.ArgumentParser(
        prog="gpt2",
        epilog="gpt2 COMMAND --help lists the options of a command.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=20),
    )
    parser.add_argument("--version", action="version", version=f"gpt2_lightning {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, help) in COMMANDS.items():
        commands.add_parser(name, help=help, add_help=False)
    if not args:
        parser.print_help(sys.stderr)
        return 2
    try:
        command = parser.parse_args(args[:1]).command
    except SystemExit as stop:
        return int(stop.code or 0)

    if not sys.stderr.isatty():
        os.environ.setdefault(
            "TQDM_MININTERVAL", "10"
        )  # seconds between two lines of a bar; tqdm reads it when imported
    from gpt2_lightning.cli.messages import exit_code

    return exit_code(command, lambda: _call(command, args[1:]))


def _call(command: str, args: list[str]) -> None:
    gc.disable()  # imports leave no garbage; looking for it takes a third of the time to the first step
    try:
        module = import_module(f"gpt2_lightning.{COMMANDS[command][0]}")
        gc.freeze()
    finally:
        gc.enable()
    from gpt2_lightning.cli.arguments import call

    call(getattr(module, command), args)


if __name__ == "__main__":
    raise SystemExit(main())
