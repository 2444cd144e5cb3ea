"""Whether the losses of compiled bf16 training equal those of eager fp32 to within the noise of bf16. Not a test.

    python tests/benchmarks/bench_curve.py [steps] [configs/quickstart.yaml] [more flags of gpt2 fit]

Runs `gpt2 fit` three times from one seed on the same tokens, each in a process of its own: eager in fp32 (without
TF32), eager in bf16, compiled in bf16. The distance of the second from the first is bf16's noise. If the third is more
than twice as far, in the mean or at the worst step, the exit code is 1. On one GPU of 80 GB:

    python tests/benchmarks/bench_curve.py 100 configs/gpt2_124m.yaml --trainer.devices 1 --trainer.strategy auto \
        --data.source stdlib --data.root data/stdlib --data.total_batch_tokens 65536 --data.micro_batch_size 16

Eager fp32 holds the logits of a micro-batch of 16 three times, 10 GB. Steps and tokens do not depend on that size.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

OFF = [f"--{section}.every_n_steps=0" for section in ("validation", "hellaswag", "samples", "checkpoint")]
RUNS = {
    "eager fp32": ["--model.compile=false", "--trainer.precision=32-true"],
    "eager bf16": ["--model.compile=false", "--trainer.precision=bf16-mixed"],
    "compiled bf16": ["--model.compile=true", "--trainer.precision=bf16-mixed"],
}


def losses(log: str) -> list[float]:
    """The training losses in a log.txt, in the order of the steps."""
    lines = [line.split() for line in log.splitlines()]
    return [float(value) for _, kind, value in lines if kind == "train"]


def distance(a: list[float], b: list[float]) -> tuple[float, float]:
    """Mean and largest absolute difference of two curves."""
    differences = [abs(x - y) for x, y in zip(a, b, strict=True)]
    return sum(differences) / len(differences), max(differences)


def within_noise(exact: list[float], noisy: list[float], curve: list[float]) -> bool:
    """Whether ``curve`` is at most twice as far from ``exact`` as ``noisy`` is, in the mean and at the worst step."""
    noise, found = distance(exact, noisy), distance(exact, curve)
    return found[0] <= 2 * noise[0] and found[1] <= 2 * noise[1]


def run(name: str, steps: int, recipe: str, more: list[str], folder: str) -> list[float]:
    flags = [f"--run_dir={folder}/{name}", f"--trainer.max_steps={steps}", *OFF, *more, *RUNS[name]]
    command = [sys.executable, "-m", "gpt2_lightning", "fit", f"--config={recipe}", *flags]
    # real fp32: `fit` lets CUDA use TF32 matmuls, which this variable of NVIDIA's libraries overrides
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
        print(f"{name} differs from eager fp32 by {mean:.6f} in the mean of {steps} steps, {largest:.6f} at most")
    good = within_noise(exact, noisy, compiled)
    print(f"the compiled bf16 run is {'within' if good else 'NOT within'} bf16's noise of the eager fp32 one")
    return 0 if good else 1


if __name__ == "__main__":
    arguments = sys.argv[1:]
    raise SystemExit(main(int(arguments[0]) if arguments else 100, *arguments[1:2], tuple(arguments[2:])))
