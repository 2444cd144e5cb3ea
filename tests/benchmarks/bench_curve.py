"""Are the first losses of the compiled bf16 run those of the eager fp32 one, to within what bf16 does? Not a test.

    python tests/bench_curve.py [steps] [configs/quickstart.yaml] [more flags of gpt2 fit]

Three runs of `gpt2 fit`, each a process of its own, from one seed on the same tokens: eager in fp32 (without TF32),
eager in bf16, compiled in bf16. How far the second is from the first is bf16's noise; the third may be twice as far, in
the mean and at the worst step, or the exit code is 1. On one GPU of 80 GB:

    python tests/bench_curve.py 100 configs/gpt2_124m.yaml --trainer.devices 1 --trainer.strategy auto \
        --data.source stdlib --data.root data/stdlib --data.total_batch_tokens 65536 --data.micro_batch_size 16

Eager fp32 holds the logits of a micro-batch of 16 three times, 10 GB; steps and tokens do not depend on it.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

RUNS = {
    "eager fp32": ["--model.compile=false", "--trainer.precision=32-true"],
    "eager bf16": ["--model.compile=false", "--trainer.precision=bf16-mixed"],
    "compiled bf16": ["--model.compile=true", "--trainer.precision=bf16-mixed"],
}


def losses(log: str) -> list[float]:
    """The train losses of a log.txt, in the order of the steps."""
    lines = [line.split() for line in log.splitlines()]
    return [float(value) for _, kind, value in lines if kind == "train"]


def distance(a: list[float], b: list[float]) -> tuple[float, float]:
    """Mean and largest absolute difference of two curves."""
    apart = [abs(x - y) for x, y in zip(a, b, strict=True)]
    return sum(apart) / len(apart), max(apart)


def within_noise(exact: list[float], noisy: list[float], curve: list[float]) -> bool:
    """Whether ``curve`` is at most twice as far from ``exact`` as ``noisy`` is, in the mean and at the worst."""
    limits, found = distance(exact, noisy), distance(exact, curve)
    return all(there <= 2 * limit for there, limit in zip(found, limits, strict=True))


def run(name: str, steps: int, recipe: str, more: list[str], folder: str) -> list[float]:
    off = [f"--{section}.every_n_steps=0" for section in ("validation", "hellaswag", "samples", "checkpoint")]
    flags = [f"--run_dir={folder}/{name}", f"--trainer.max_steps={steps}", *off, *more, *RUNS[name]]
    command = [sys.executable, "-m", "gpt2_lightning", "fit", f"--config={recipe}", *flags]
    # fp32 as such: `fit` lets CUDA round the factors of its matmuls to TF32, unless NVIDIA's libraries are told not to
    subprocess.run(command, check=True, env=os.environ | {"NVIDIA_TF32_OVERRIDE": "0"}, stdout=subprocess.DEVNULL)
    return losses((Path(folder) / name / "log.txt").read_text())


def main(steps: int = 100, recipe: str = "configs/quickstart.yaml", more: tuple[str, ...] = ()) -> int:
    with tempfile.TemporaryDirectory() as folder:
        curves = {name: run(name, steps, recipe, list(more), folder) for name in RUNS}
    exact, noisy, compiled = curves.values()
    print(f"{'step':>6} {'eager fp32':>12} {'compiled bf16':>14}")
    for step in sorted({0, steps // 4, steps // 2, 3 * steps // 4, steps - 1}):
        print(f"{step:>6} {exact[step]:12.6f} {compiled[step]:14.6f}")
    for name in ("eager bf16", "compiled bf16"):
        mean, largest = distance(exact, curves[name])
        print(f"{name} is {mean:.6f} from eager fp32 in the mean of {steps} steps, {largest:.6f} at the most")
    good = within_noise(exact, noisy, compiled)
    print(f"the compiled bf16 run is {'within' if good else 'NOT within'} bf16's noise of the eager fp32 one")
    return 0 if good else 1


if __name__ == "__main__":
    arguments = sys.argv[1:]
    raise SystemExit(main(int(arguments[0]) if arguments else 100, *arguments[1:2], tuple(arguments[2:])))
