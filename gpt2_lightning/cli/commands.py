"""The commands that are not on LightningCLI. Each function's signature and docstring are its command-line options.

They import what they need when they are called: ``gpt2 prepare`` and ``gpt2 export`` must not wait for Lightning.
"""

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveFloat, PositiveInt

from gpt2_lightning.errors import UserError

if TYPE_CHECKING:
    import torch


def prepare(
    source: list[str] | None = None,
    out: Path | None = None,
    name: str | None = None,
    revision: str | None = None,
    text_column: str = "text",
    shard_tokens: PositiveInt = 100_000_000,
    workers: PositiveInt | None = None,
    format: Literal["npy", "bin"] = "npy",
    verify: Path | None = None,
    show: Path | None = None,
    step: NonNegativeInt = 0,
) -> None:
    """Tokenize documents into shards. The same command continues a preparation that was interrupted.

    Args:
        source: fineweb-edu, stdlib, ORG/NAME[@REVISION] on the hub, or local files and globs
        out: folder of the shards
        name: configuration of a hub dataset, such as sample-10BT
        revision: branch, tag or commit of a hub dataset
        text_column: field that holds the text
        shard_tokens: tokens per shard
        workers: threads that tokenize; one per core by default
        format: build-nanogpt's shards (npy) or llm.c's (bin)
        verify: instead, check every shard of this folder against its manifest
        show: instead, print the text that one step of the run in this folder trains on
        step: the step to show, counted from 0
    """
    if sum(option is not None for option in (source, verify, show)) != 1 or (source is not None and out is None):
        raise UserError("give --source S --out DIR to prepare data, or --verify DIR, or --show RUN_DIR --step N")
    if verify is not None:
        from gpt2_lightning.data.shards import verify as verify_folder

        print(f"{verify}: all {len(verify_folder(verify).shards)} shards match their manifest")
    elif show is not None:
        from gpt2_lightning.tools.show import show_step

        print(show_step(show, step))
    else:
        from gpt2_lightning.data.prepare.write import prepare

        assert source is not None
        assert out is not None
        manifest = prepare(
            source[0] if len(source) == 1 else source,
            out,
            name=name,
            revision=revision,
            text_column=text_column,
            shard_tokens=shard_tokens,
            workers=workers,
            format=format,
        )
        print(f"{out}: {manifest.tokens('train'):,} tokens to train on, {manifest.tokens('val'):,} to validate on")


def generate(
    path: str,
    prompt: str | None = None,
    max_new_tokens: PositiveInt = 100,
    num_samples: PositiveInt = 1,
    temperature: PositiveFloat = 1.0,
    top_k: PositiveInt = 50,
    top_p: ClosedUnitInterval = 1.0,
    seed: NonNegativeInt | None = None,
) -> None:
    """Sample text from a model.

    Args:
        path: checkpoint, exported folder, or hub name such as gpt2
        prompt: text to start from; read from standard input by default
        max_new_tokens: length of a sample at most
        num_samples: how many samples
        temperature: divides the logits; below 1 makes likely tokens likelier
        top_k: sample among the k likeliest tokens; 1 is greedy
        top_p: sample among the fewest tokens whose probabilities reach p
        seed: the same seed gives the same text
    """
    from gpt2_lightning.checkpoints.load import load
    from gpt2_lightning.generate import TextStream, generate
    from gpt2_lightning.tokenizer import VOCAB_SIZE, get_tokenizer

    text = sys.stdin.read() if prompt is None else prompt
    model = load(path).to(_device())
    if model.config.vocab_size < VOCAB_SIZE:
        raise UserError(
            f"{path} has a vocabulary of {model.config.vocab_size} tokens, not GPT-2's: its samples cannot be decoded"
        )
    ids = get_tokenizer().encode(text, allowed_special="all")  # <|endoftext|> in a prompt is the token
    stream = TextStream()

    def show(_row: int, token: int) -> None:
        print(stream.feed(token), end="", flush=True)

    for i in range(num_samples):
        if num_samples > 1:
            print(f"--- sample {i}")
        print(text, end="", flush=True)
        generate(
            model,
            [ids],
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=None if seed is None else seed + i,
            on_token=show,
        )
        print(stream.finish())


def hellaswag(
    path: str, style: Literal["nanogpt", "harness"] = "nanogpt", examples: Path | None = None, json: bool = False
) -> None:
    """Score a model on HellaSwag.

    Args:
        path: checkpoint, exported folder, or hub name such as gpt2
        style: the rules of build-nanogpt or of lm-evaluation-harness; GPT-2 (124M) scores 0.2955 and 0.3114
        examples: HellaSwag's .jsonl file; by default the hub's, else the 48 built-in examples
        json: print one JSON object and nothing else
    """
    from gpt2_lightning.checkpoints.load import load
    from gpt2_lightning.evals.hellaswag import evaluate, load_examples

    found = load_examples(examples)
    if found.note:
        print(found.note, file=sys.stderr)
    score = evaluate(load(path).to(_device()), found, style, progress=not json)
    if json:
        figures = {"n": score.n, "acc": score.acc, "acc_norm": score.acc_norm, "stderr": score.stderr}
        _print_json(figures | {"style": style, "examples": found.tag})
    else:
        print(f"{path} on {found.name}, {style} style: {score}")


def export(
    checkpoint: str, out: Path, format: Literal["hf", "llmc"] = "hf", dtype: Literal["fp32", "bf16"] = "fp32"
) -> None:
    """Write weights for other programs.

    Args:
        checkpoint: checkpoint, exported folder, or hub name such as gpt2
        out: folder (hf) or file (llmc) to write
        format: a folder for transformers (hf), or llm.c's .bin file (llmc)
        dtype: of the written weights
    """
    from gpt2_lightning.checkpoints.export import export

    export(checkpoint, out, format, dtype)
    print(f"wrote {out}")


def bench(
    device: Literal["cuda", "mps", "cpu"] | None = None,
    rungs: str | None = None,
    json: bool = False,
    block_size: PositiveInt | None = None,
    n_layer: PositiveInt | None = None,
    n_head: PositiveInt | None = None,
    n_embd: PositiveInt | None = None,
    micro_batch_size: PositiveInt | None = None,
) -> None:
    """Time the video's speed ladder on this machine.

    Args:
        device: cuda, mps or cpu; the best one by default
        rungs: time only these, separated by commas; each keeps what those below it changed
        json: print one JSON object and nothing else
        block_size: the video's shape on a GPU, quickstart's on a CPU by default, as the next four
        n_layer: number of blocks
        n_head: attention heads per block
        n_embd: width of the residual stream
        micro_batch_size: sequences of a micro-batch
    """
    from dataclasses import replace

    import torch

    from gpt2_lightning.cli.callbacks import bench_trainer
    from gpt2_lightning.tools.bench import RUNGS, default_shape, measure

    names = [rung.name for rung in RUNGS]
    chosen = names if rungs is None else rungs.split(",")
    if unknown := sorted(set(chosen) - set(names)):
        raise UserError(f"there is no rung {', '.join(unknown)}: choose from {','.join(names)}")
    where = _device() if device is None else torch.device(device)
    config, default_size = default_shape(where)
    shape = {"block_size": block_size, "n_layer": n_layer, "n_head": n_head, "n_embd": n_embd}
    config = replace(config, **{name: size for name, size in shape.items() if size is not None})
    table = sys.stderr if json else sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # the Trainer's own lines are not part of the result
        found = measure(config, micro_batch_size or default_size, where, chosen, table, bench_trainer)
    if json:
        _print_json(found)


def report(run_dirs: list[Path], out: Path | None = None) -> None:
    """Put one or several runs on one page, with the published figures of GPT-2 and GPT-3.

    Args:
        run_dirs: folders of runs, such as runs/quickstart
        out: folder to write report.html and report.png to; the first run's by default
    """
    from gpt2_lightning.tools.report import write_report

    path, notes = write_report(run_dirs, out)
    for note in notes:
        print(f"gpt2 report: {note}", file=sys.stderr)
    print(f"wrote {path} and {path.with_suffix('.png')}")


def _device() -> "torch.device":
    """The accelerator of this machine, or its CPU."""
    import torch

    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _print_json(content: dict) -> None:
    from json import dumps

    print(dumps(content))
