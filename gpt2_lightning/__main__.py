"""The ``gpt2`` command. Each subcommand imports what it needs when it is called: ``gpt2 --help`` pays for nothing."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from gpt2_lightning import __version__
from gpt2_lightning.cli.messages import message_of, rank0_reported, refuse_odd_launcher, stdout_closed
from gpt2_lightning.errors import UserError

COMMANDS = {
    "fit": "train, from a recipe: --config configs/quickstart.yaml [--trainer.… --model.… --data.…]",
    "validate": "validation loss and HellaSwag of a checkpoint: --config … --ckpt_path …",
    "prepare": "documents to token shards",
    "generate": "continue a prompt",
    "hellaswag": "score a model on HellaSwag",
    "export": "write weights for transformers, or for llm.c",
    "plan": "parameters, memory, time and cost of a recipe, before anything runs: --config … [--gpu h100 --gpus 8]",
    "bench": "the video's ladder of speed on this machine, beside its limits",
    "report": "curves, figures and samples of runs, as a page and a picture",
}


class Parser(argparse.ArgumentParser):
    """argparse whose usage errors are one line of usage and one sentence."""

    def error(self, message: str) -> NoReturn:
        for kind, mend in (("int", "give a whole number"), ("float", "give a number")):
            message = message.replace(f"invalid {kind} value:", f"{mend}, not")
        if message.startswith("unrecognized arguments"):
            message += f": see {self.prog} --help"
        if "not allowed with argument" in message:
            message += ": give one of the two"
        needed = [a for a in self._actions if a.required]
        words = [a.metavar or a.dest if not a.option_strings else f"{a.option_strings[-1]} …" for a in needed]
        print("usage:", self.prog, *words, "[options]", file=sys.stderr)
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise SystemExit(2)


def main(args: Sequence[str] | None = None) -> int:
    """Runs ``gpt2 ARGS``; the exit code: 0, 1 for bad input, 2 for a usage error."""
    args = list(sys.argv[1:] if args is None else args)
    command = args[0] if args else ""
    if command in ("", "-h", "--help"):
        print("usage: gpt2 COMMAND [options]; gpt2 COMMAND --help tells the options\n")
        for name, what in COMMANDS.items():
            print(f"  {name:<10} {what}")
        return 0 if command else 2
    if command == "--version":
        print(f"gpt2_lightning {__version__}")
        return 0
    if command not in COMMANDS:
        print("usage: gpt2 COMMAND [options]", file=sys.stderr)
        print(f"gpt2: error: no command {command!r}: choose from {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    run = {
        "fit": _lightning,
        "validate": _lightning,
        "prepare": _prepare,
        "generate": _generate,
        "hellaswag": _hellaswag,
        "export": _export,
        "plan": _plan,
        "bench": _bench,
        "report": _report,
    }[command]
    try:
        run(args)
        sys.stdout.flush()  # what cannot be written shows here, not when the interpreter ends
    except (SystemExit, KeyboardInterrupt) as stop:
        # Lightning's Trainer makes an exit with code 1 of a Ctrl-C
        if not isinstance(stop, KeyboardInterrupt) and not isinstance(stop.__context__, KeyboardInterrupt):
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        again = ": the same command goes on from what is saved" if command in ("fit", "prepare") else ""
        print(f"gpt2 {command}: interrupted{again}", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and stdout_closed():
            return 141
        if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK") == "0":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # its agent, which fails as well, must not hush what we say
        sentence = message_of(error)
        if sentence is None:
            raise
        if not rank0_reported():
            print(f"gpt2 {command}: error: {sentence}", file=sys.stderr)
        return 1
    return 0


def _lightning(args: list[str]) -> None:
    refuse_odd_launcher()
    import gc

    if "gpt2_lightning.cli.fit" not in sys.modules:
        # none of the objects that imports make is garbage, and to look for it there, then and ever after, is a third of
        # the time up to the first step
        gc.disable()
        try:
            import gpt2_lightning.cli.fit  # noqa: F401

            gc.freeze()
        finally:
            gc.enable()
    from gpt2_lightning.cli.fit import run

    run(args)


def _prepare(args: list[str]) -> None:
    parser = Parser(prog="gpt2 prepare", description="Tokenize documents into shards; run again, it goes on.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--source", nargs="+", help="fineweb-edu, stdlib, ORG/NAME on the hub, or local files and globs")
    what.add_argument("--verify", metavar="DIR", help="check every shard in DIR against its manifest instead")
    what.add_argument("--show", metavar="RUN_DIR", help="print the text that a step of this run trains on instead")
    parser.add_argument("--step", type=int, default=0, help="which step to show (default: 0)")
    parser.add_argument("--out", metavar="DIR", help="folder of the shards")
    parser.add_argument("--name", help="configuration of a hub dataset, such as sample-10BT")
    parser.add_argument("--revision", help="branch, tag or commit of a hub dataset")
    parser.add_argument("--text_column", default="text", help="field that holds the text (default: text)")
    parser.add_argument("--shard_tokens", type=int, default=100_000_000, help="tokens per shard (default: 100000000)")
    parser.add_argument("--workers", type=int, help="threads that tokenize (default: one per core)")
    parser.add_argument("--format", choices=("npy", "bin"), default="npy", help="build-nanogpt's or llm.c's shards")
    given = parser.parse_args(args[1:])
    if given.verify:
        from gpt2_lightning.data.shards import verify

        manifest = verify(Path(given.verify))
        print(f"{given.verify}: {len(manifest.shards)} shards as their manifest says")
        return
    if given.show:
        from gpt2_lightning.tools.show import show_step

        if not 0 <= given.step < 2**40:
            parser.error(f"--step is {given.step}: give a whole number of at least 0, a step of the run")
        print(show_step(Path(given.show), given.step))
        return
    if not given.out:
        parser.error("--source needs --out DIR, the folder to write the shards to")
    from gpt2_lightning.data.prepare.write import prepare

    source = given.source[0] if len(given.source) == 1 else given.source
    names = ("name", "revision", "text_column", "shard_tokens", "workers", "format")
    options: dict[str, Any] = {name: getattr(given, name) for name in names}
    manifest = prepare(source, Path(given.out), **options)
    print(f"{given.out}: {manifest.tokens('train'):,} tokens to train on, {manifest.tokens('val'):,} to validate on")


def _generate(args: list[str]) -> None:
    parser = Parser(prog="gpt2 generate", description="Continue a prompt with a trained GPT-2.")
    parser.add_argument("path", metavar="PATH", help="checkpoint, exported folder, or hub name such as gpt2")
    parser.add_argument("--prompt", help="text to continue (default: standard input)")
    parser.add_argument("--max_new_tokens", type=int, default=100)
    parser.add_argument("--num_samples", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top_k", type=int, default=50, help="sample among the k likeliest; 1 is greedy (default: 50)")
    parser.add_argument("--top_p", type=float, default=1.0, help="… and among the fewest that reach this probability")
    parser.add_argument("--seed", type=int, help="the same seed gives the same text")
    given = parser.parse_args(args[1:])
    if given.num_samples < 1 or given.max_new_tokens < 1:
        parser.error(
            f"--num_samples is {given.num_samples} and --max_new_tokens {given.max_new_tokens}: give at least 1 of each"
        )
    if given.seed is not None and not 0 <= given.seed < 2**62:
        parser.error(f"--seed is {given.seed}: give a whole number from 0 to 2**62")
    from gpt2_lightning.checkpoints.load import load
    from gpt2_lightning.generate import TextStream, generate
    from gpt2_lightning.tokenizer import VOCAB_SIZE, get_tokenizer

    try:
        text = sys.stdin.buffer.read().decode() if given.prompt is None else given.prompt.encode().decode()
    except UnicodeError:
        parser.error("the prompt is not UTF-8 text")
    model = load(given.path).to(_device())
    if model.config.vocab_size < VOCAB_SIZE:
        raise UserError(
            f"{given.path} has a vocabulary of {model.config.vocab_size} ids, which is not GPT-2's: its text cannot be "
            "written; train with model.config.vocab_size=50304 on GPT-2 tokens"
        )
    prompt = get_tokenizer().encode(text, allowed_special="all")  # <|endoftext|> begins a text of its own
    stream = TextStream()
    for i in range(given.num_samples):
        pending = [f"--- sample {i}\n" if given.num_samples > 1 else "", text]  # printed once the prompt is found good

        def show(_row: int, token: int) -> None:
            print("".join(pending) + stream.feed(token), end="", flush=True)  # noqa: B023
            pending.clear()  # noqa: B023

        generate(
            model,
            [prompt],
            given.max_new_tokens,
            temperature=given.temperature,
            top_k=given.top_k,
            top_p=given.top_p,
            seed=None if given.seed is None else given.seed + i,
            on_token=show,
        )
        print("".join(pending) + stream.finish())


def _hellaswag(args: list[str]) -> None:
    parser = Parser(prog="gpt2 hellaswag", description="Score a model on HellaSwag.")
    parser.add_argument("path", metavar="PATH", help="checkpoint, exported folder, or hub name such as gpt2")
    parser.add_argument(
        "--style", choices=("nanogpt", "harness"), default="nanogpt", help="whose rules (default: nanogpt)"
    )
    parser.add_argument(
        "--examples", metavar="FILE", help="HellaSwag's .jsonl (default: the hub's, else the built-in set)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    given = parser.parse_args(args[1:])
    import json

    from gpt2_lightning.checkpoints.load import load
    from gpt2_lightning.evals.hellaswag import evaluate, load_examples

    examples = load_examples(given.examples)
    if examples.note:
        print(examples.note, file=sys.stderr)
    score = evaluate(load(given.path).to(_device()), examples, given.style, progress=not given.json)
    if given.json:
        figures = {"n": score.n, "acc": score.acc, "acc_norm": score.acc_norm, "stderr": score.stderr}
        print(json.dumps(figures | {"style": given.style, "examples": examples.tag}))
    else:
        print(f"{given.path} on {examples.name}, {given.style} style: {score}")


def _export(args: list[str]) -> None:
    parser = Parser(prog="gpt2 export", description="Write weights for others to open.")
    parser.add_argument("checkpoint", metavar="CKPT", help="checkpoint, exported folder, or hub name such as gpt2")
    parser.add_argument("out", metavar="OUT", help="folder (hf) or file (llmc) to write")
    parser.add_argument(
        "--format", choices=("hf", "llmc"), default="hf", help="for transformers or llm.c (default: hf)"
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights (default: fp32)")
    given = parser.parse_args(args[1:])
    from gpt2_lightning.checkpoints.load import export

    export(given.checkpoint, given.out, given.format, given.dtype)
    print(f"wrote {given.out}")


def _plan(args: list[str]) -> None:
    parser = Parser(
        prog="gpt2 plan",
        description="What a recipe asks for, before anything runs: parameters, FLOPs, tokens, memory, time, cost.",
        epilog="Every --config, --trainer.…, --model.… and --data.… of gpt2 fit as well.",
        allow_abbrev=False,
    )
    parser.add_argument("--gpus", type=int, help="how many, over all nodes (default: the recipe's devices · num_nodes)")
    parser.add_argument("--gpu", help="which kind, such as h100 or 4090, or its memory alone, such as 24GB")
    parser.add_argument("--mfu", type=float, default=0.4, help="assumed share of the GPUs' peak (default: 0.4)")
    parser.add_argument("--dollars_per_hour", type=float, help="price of one GPU")
    parser.add_argument("--micro_batch_size", metavar="N", help="short for --data.micro_batch_size")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    given, recipe_args = parser.parse_known_args(args[1:])
    if given.gpus is not None and given.gpus < 1:
        parser.error(f"--gpus is {given.gpus}: give a whole number of at least 1")
    if not 0 < given.mfu <= 1:
        parser.error(f"--mfu is {given.mfu:g}: give a share above 0 and up to 1, such as 0.4")
    if given.dollars_per_hour is not None and not 0 <= given.dollars_per_hour < float("inf"):
        parser.error(f"--dollars_per_hour is {given.dollars_per_hour:g}: give the price of one GPU, such as 2.50")
    import json

    from gpt2_lightning.tools.gpus import find_gpu

    try:
        gpu = find_gpu(given.gpu) if given.gpu else None
    except ValueError as error:
        parser.error(str(error))
    refuse_odd_launcher()
    if given.micro_batch_size is not None:
        recipe_args += ["--data.micro_batch_size", given.micro_batch_size]
    from gpt2_lightning.cli.fit import read_recipe
    from gpt2_lightning.tools.plan import describe, plan

    found = plan(read_recipe(["plan", *recipe_args]), gpu, given.gpus, given.mfu, given.dollars_per_hour)
    print(json.dumps(found) if given.json else describe(found))


def _bench(args: list[str]) -> None:
    parser = Parser(prog="gpt2 bench", description="Climb the video's ladder of speed on this machine.")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best at hand)")
    parser.add_argument("--rungs", metavar="A,B", help="time these only; each still keeps what those below it changed")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    shape = ("block_size", "n_layer", "n_head", "n_embd", "micro_batch_size")
    for name in shape:
        parser.add_argument(f"--{name}", type=int, help="default: the video's on a GPU, quickstart's on a CPU")
    given = parser.parse_args(args[1:])
    for name in shape:
        if getattr(given, name) is not None and getattr(given, name) < 1:
            parser.error(f"--{name} is {getattr(given, name)}: give a whole number of at least 1")
    refuse_odd_launcher()
    import contextlib
    import json
    from dataclasses import replace

    import torch

    from gpt2_lightning.tools.bench import RUNGS, default_shape
    from gpt2_lightning.tools.bench_table import measure

    if given.device and given.device not in _devices():
        parser.error(f"no device {given.device} here: choose from {', '.join(_devices())}")
    known = [rung.name for rung in RUNGS]
    names = known if given.rungs is None else given.rungs.split(",")
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no rung {', '.join(unknown)}: choose from {','.join(known)}")
    device = torch.device(given.device or _device())
    config, micro_batch_size = default_shape(device)
    typed = {name: getattr(given, name) for name in shape[:-1] if getattr(given, name) is not None}
    config, micro_batch_size = replace(config, **typed), given.micro_batch_size or micro_batch_size
    table = sys.stderr if given.json else sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # what the Trainer says is no part of the result
        found = measure(config, micro_batch_size, device, names, table)
    if given.json:
        print(json.dumps(found))


def _report(args: list[str]) -> None:
    parser = Parser(prog="gpt2 report", description="Put one or several runs on one page, against GPT-2 and GPT-3.")
    parser.add_argument("folders", metavar="RUN_DIR", nargs="+", help="folder of a run, such as runs/quickstart")
    parser.add_argument("--out", metavar="DIR", help="folder to write to (default: that of the first run)")
    given = parser.parse_args(args[1:])
    from gpt2_lightning.tools.report import write_report

    path, notes = write_report([Path(folder) for folder in given.folders], given.out and Path(given.out))
    for note in notes:
        print(f"gpt2 report: {note}", file=sys.stderr)
    print(f"wrote {path} and {path.with_suffix('.png')}")


def _device() -> str:
    """The best device at hand."""
    return _devices()[0]


def _devices() -> list[str]:
    """The devices at hand, of cuda, mps and cpu, the best first."""
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [name for name, is_there in there.items() if is_there]


if __name__ == "__main__":
    raise SystemExit(main())
