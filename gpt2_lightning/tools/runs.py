"""Reads a run's folder as plain data: curves, texts, starts and their settings. Imports no torch."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from gpt2_lightning.errors import UserError

NANOGPT_STEP_TOKENS = 524288
"""Tokens per step of a run that left only ``log.txt``, if its config does not say: build-nanogpt's."""
LOG_TXT_TAGS = {"train": "train/loss", "val": "val/loss", "hella": "hellaswag/acc_norm"}


@dataclass(frozen=True, eq=False)  # arrays have no single truth value to compare by
class Curve:
    """One logged metric over a run."""

    steps: np.ndarray
    """int64 (n,), ascending. For ``train/*`` the step itself, for evaluations the number of steps before them."""
    values: np.ndarray
    """float64 (n,)."""


@dataclass(frozen=True)
class Start:
    """One start of a run, from its event file."""

    began: float
    """Unix time of the first event, seconds."""
    seconds: float
    """Until the last event, including evaluation."""
    first_step: int
    """First step that was trained; -1 if none was."""
    last_step: int


@dataclass(frozen=True, eq=False)
class Run:
    """A run's folder. Several starts are joined into one curve, in which each step occurs once."""

    name: str
    curves: dict[str, Curve]
    texts: dict[str, dict[int, str]] = field(default_factory=dict)
    """Tag → step → text."""
    starts: list[Start] = field(default_factory=list)
    configs: list[dict[str, str]] = field(default_factory=list)
    """Per start: dotted name → value as written in a recipe."""

    @property
    def config(self) -> dict[str, str]:
        """The settings of the last start."""
        return self.configs[-1] if self.configs else {}

    def tokens_after(self, steps: np.ndarray) -> np.ndarray:
        """Tokens trained on after these numbers of steps, interpolated between the logged ones."""
        logged = self.curves.get("train/tokens")
        if logged is None:
            return steps * float(self.config.get("data.total_batch_tokens", NANOGPT_STEP_TOKENS))
        return np.interp(steps, np.concatenate([[0], logged.steps + 1]), np.concatenate([[0.0], logged.values]))


def read_run(folder: Path) -> Run:
    """Reads TensorBoard events, or ``log.txt`` if there are none, and ``config*.yaml``.

    Raises:
        UserError: there is nothing to read.
    """
    configs = [flat(yaml.safe_load(path.read_text(encoding="utf-8"))) for path in config_paths(folder)]
    points, texts, starts = _read_events(folder)
    points = points or _read_log_txt(folder / "log.txt")
    if not points:
        runs = sorted({str(path.parent) for path in folder.glob("*/events.out.tfevents.*")})
        fix = f"give {' '.join(runs)}" if runs else "give the folder of a run, such as runs/quickstart"
        raise UserError(f"{folder} has no TensorBoard events and no log.txt: {fix}")
    curves = {}
    for tag, values in points.items():
        steps = sorted(values)
        curves[tag] = Curve(np.array(steps), np.array([values[step] for step in steps], dtype=float))
    return Run(folder.absolute().name, curves, texts, starts, configs)


def _read_events(folder: Path) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, str]], list[Start]]:
    """Scalars and texts as tag → step → value, and the starts.

    Each start writes one event file. A truncated or damaged file is read up to the damage.
    """
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, TENSORS, EventAccumulator

    scalars: dict[str, dict[int, float]] = {}
    texts: dict[str, dict[int, str]] = {}
    starts: list[Start] = []
    for path in sorted(folder.glob("events.out.tfevents.*"), key=_start_number):
        file = EventAccumulator(str(path), size_guidance={SCALARS: 0, TENSORS: 0}).Reload()  # 0: keep all
        logged = {tag: file.Scalars(tag) for tag in file.Tags()[SCALARS]}
        if not logged:
            continue
        trained = [event.step for event in logged.get("train/loss", [])]
        times = [event.wall_time for events in logged.values() for event in events]
        starts.append(Start(min(times), max(times) - min(times), min(trained, default=-1), max(trained, default=-1)))
        # this start repeats what earlier ones logged after its checkpoint
        resumed = min(trained, default=math.inf)
        scalars = {tag: _until(resumed, tag, values) for tag, values in scalars.items()}
        texts = {tag: _until(resumed, tag, values) for tag, values in texts.items()}
        for tag, events in logged.items():
            scalars.setdefault(tag, {}).update((event.step, event.value) for event in events)
        for tag in file.Tags()[TENSORS]:
            if tag.endswith("/text_summary"):
                found = ((event.step, event.tensor_proto.string_val[0].decode()) for event in file.Tensors(tag))
                texts.setdefault(tag.removesuffix("/text_summary"), {}).update(found)
    return {tag: values for tag, values in scalars.items() if values}, texts, starts


def _start_number(events: Path) -> tuple[int, str]:
    """Sorts event files by the suffix ``.start3`` that fit gives them, then by the time that begins their names."""
    number = re.search(r"\.start(\d+)$", events.name)
    return (int(number[1]) if number else -1, events.name)


def _until(resumed: float, tag: str, values: dict[int, Any]) -> dict[int, Any]:
    """The values from before a checkpoint at this step. Evaluations at the step come before its checkpoint."""
    return {step: value for step, value in values.items() if step < resumed + (not tag.startswith("train/"))}


def _read_log_txt(path: Path) -> dict[str, dict[int, float]]:
    """build-nanogpt's log: lines such as ``250 val 5.9``. Other lines are skipped."""
    found: dict[str, dict[int, float]] = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        if match := re.fullmatch(r"(\d+) (train|val|hella) ([-+.\w]+)", line):
            found.setdefault(LOG_TXT_TAGS[match[2]], {})[int(match[1])] = float(match[3])
    return found


def config_paths(folder: Path) -> list[Path]:
    """``config.yaml``, ``config_1.yaml``, … ``config_10.yaml``: one for each start, in order."""
    paths = [path for path in folder.glob("config*.yaml") if re.fullmatch(r"config(_\d+)?", path.stem)]
    return sorted(paths, key=lambda path: (len(path.name), path.name))


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as ``model.optimizer.lr`` → ``0.006``, named as on the command line."""
    found: dict[str, str] = {}
    for name, value in config.items():
        if name == "class_path":
            found[prefix.removesuffix(".")] = str(value)
        elif isinstance(value, dict) and value:
            found |= flat(value, prefix if name == "init_args" else f"{prefix}{name}.")
        elif value is None or isinstance(value, bool):
            found[prefix + name] = {None: "null", True: "true", False: "false"}[value]
        else:
            found[prefix + name] = f"{value:g}" if isinstance(value, float) else str(value)
    return found
