"""Muon against AdamW at the same number of tokens, on the bytes of any text. Not a test.

    python tests/benchmarks/bench_muon.py TRAIN.jsonl[.xz] VAL.jsonl[.xz] [--steps 216] [--seeds 3] [--out bench_muon]

Each optimizer's peak learning rate is the best of a few in runs of a third of the length. With it, one run per seed is
made in full. Prints the validation losses by step, and the step at which Muon first reaches the final loss of AdamW.
The runs are `gpt2 fit`'s and resume if interrupted. A full one takes about eight minutes on one core.
"""

import argparse
import random
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpt2_lightning.__main__ import main
from gpt2_lightning.data.prepare.documents import read_documents
from gpt2_lightning.data.shards import write_shard

RATES = {"AdamW": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3), "Muon": (2e-3, 4e-3, 8e-3, 1.6e-2)}
BLOCK_SIZE, MICRO_BATCH_SIZE = 256, 32
TOTAL_BATCH_TOKENS = BLOCK_SIZE * MICRO_BATCH_SIZE


def write_bytes(source: Path, shard: Path, n: int) -> None:
    """Write the first ``n`` bytes of the documents, in a random order and separated by zero bytes, as tokens."""
    documents = [text.encode() for text, _ in read_documents(source, "text") if isinstance(text, str)]
    random.Random(0).shuffle(documents)
    write_shard(shard, np.frombuffer(b"\0".join(documents)[:n], dtype=np.uint8).astype(np.uint16))


def recipe(args: argparse.Namespace, optimizer: str, lr: float, seed: int, steps: int) -> dict[str, Any]:
    return {
        "seed_everything": seed,
        "trainer": {
            "max_steps": steps,
            "accelerator": args.accelerator,
            "enable_progress_bar": False,
            "precision": "bf16-mixed",
        },
        "model": {
            "config": {"block_size": BLOCK_SIZE, "vocab_size": 256, "n_layer": 6, "n_head": 6, "n_embd": 192},
            "optimizer": {
                "class_path": f"gpt2_lightning.optim.{optimizer}",
                "init_args": {"lr": lr} | ({"momentum_warmup_steps": steps // 4} if optimizer == "Muon" else {}),
            },
            "lr_scheduler": {
                "class_path": "gpt2_lightning.schedule.WarmupCosine",
                "init_args": {"warmup_steps": steps // 12, "min_lr": 0.0},
            },
        },
        "data": {
            "root": str(args.out / "data"),
            "source": None,
            "order": "shuffled",
            "seed": seed,
            "total_batch_tokens": TOTAL_BATCH_TOKENS,
            "micro_batch_size": MICRO_BATCH_SIZE,
        },
        "validation": {"every_n_steps": args.every_n_steps, "tokens": 32768},
        "hellaswag": {"every_n_steps": 0},
        "samples": {"every_n_steps": 0},
        "checkpoint": {"every_n_steps": args.every_n_steps},
        "run_dir": str(args.out / f"{optimizer}-{lr:g}-{steps}-{seed}"),
    }


def losses(args: argparse.Namespace, optimizer: str, lr: float, seed: int, steps: int) -> dict[int, float]:
    """Validation loss by step of that run, which is made first if needed."""
    config = recipe(args, optimizer, lr, seed, steps)
    run_dir = Path(config["run_dir"])
    path = args.out / f"{run_dir.name}.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(path)]) == 0
    for saved in run_dir.glob("checkpoints/*.ckpt"):
        if saved.name != "last.ckpt":
            saved.unlink()
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return {event.step: event.value for event in events.Scalars("val/loss")}


def compare(args: argparse.Namespace) -> None:
    data = args.out / "data"
    data.mkdir(parents=True, exist_ok=True)
    if not any(data.iterdir()):
        write_bytes(args.train, data / "text_train_000001.npy", 16_000_000)
        write_bytes(args.val, data / "text_val_000000.npy", 1_000_000)
    third = args.steps // 3 // args.every_n_steps * args.every_n_steps
    best = {}
    for optimizer, rates in RATES.items():
        ends = {lr: losses(args, optimizer, lr, 0, third)[third] for lr in rates}
        best[optimizer] = min(ends, key=ends.__getitem__)
        tried = ", ".join(f"{lr:g}: {end:.4f}" for lr, end in ends.items())
        print(f"{optimizer} after {third} steps: {tried}; best: {best[optimizer]:g}", flush=True)
    shares = []
    for seed in range(1, args.seeds + 1):
        curves = {optimizer: losses(args, optimizer, lr, seed, args.steps) for optimizer, lr in best.items()}
        end = curves["AdamW"][args.steps]
        reached = next((step for step, loss in curves["Muon"].items() if loss <= end), None)
        shares.append(reached / args.steps if reached else float("inf"))
        print(f"seed {seed}: AdamW ends at {end:.4f}, which Muon reaches at step {reached} of {args.steps}")
        print("  step    AdamW     Muon")
        for step, loss in curves["AdamW"].items():
            print(f"{step:6d} {loss:8.4f} {curves['Muon'][step]:8.4f}", flush=True)
    print(f"Muon's steps over AdamW's: median {statistics.median(shares):.2f}, largest {max(shares):.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("train", type=Path)
    parser.add_argument("val", type=Path)
    parser.add_argument("--steps", type=int, default=216)
    parser.add_argument("--every_n_steps", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--out", type=Path, default=Path("bench_muon"))
    compare(parser.parse_args())
