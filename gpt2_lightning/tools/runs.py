"""What a run left in its folder, as plain data: curves, samples, its starts and their settings. No torch."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from gpt2_lightning.errors import UserError

NANOGPT_STEP_TOKENS = 524288
"""Tokens of a step where only a ``log.txt`` is there: build-nanogpt's, whose format that is."""
MAIN_SETTINGS = re.compile(
    r"model\.(config\..*|init_from|optimizer.*|lr_scheduler.*)|data\.(?!num_workers).*|"
    r"trainer\.(max_steps|precision|devices|num_nodes|strategy|gradient_clip_val)|seed_everything"
)
"""The names of the settings that make a run what it is."""
LOG_WORDS = {"train": "train/loss", "val": "val/loss", "hella": "hellaswag/acc_norm"}


@dataclass(frozen=True, eq=False)  # arrays are not equal or unequal
class Curve:
    """One logged number over a run, each step once."""

    steps: np.ndarray
    """int64, rising: of ``train/*`` the step itself, of evaluations the number of steps that they come after."""
    values: np.ndarray
    """float64."""

    @property
    def last(self) -> float:
        return float(self.values[-1])


@dataclass(frozen=True)
class Start:
    """One start of a run: what one event file tells."""

    began: float
    """Unix time of its first event, seconds."""
    seconds: float
    """From there to its last one, evaluations and all."""
    first_step: int
    """The first step that it trained; -1 where it trained none."""
    last_step: int


@dataclass(frozen=True, eq=False)
class Run:
    """A run's folder. Several starts make one curve: what was made again stands there once."""

    name: str
    curves: dict[str, Curve]
    texts: dict[str, dict[int, str]] = field(default_factory=dict)
    """tag → step → text."""
    starts: list[Start] = field(default_factory=list)
    configs: list[dict[str, str]] = field(default_factory=list)
    """Of each start, dotted name → value as a recipe writes it."""
    notes: list[str] = field(default_factory=list)
    """What could not be read, one sentence each."""

    @property
    def config(self) -> dict[str, str]:
        """The settings of the last start."""
        return self.configs[-1] if self.configs else {}

    def tokens_after(self, steps: np.ndarray) -> np.ndarray:
        """Tokens trained on after so many steps, straight between the logged ones."""
        logged = self.curves.get("train/tokens")
        if logged is None:
            return steps * float(self.config.get("data.total_batch_tokens", NANOGPT_STEP_TOKENS))
        return np.interp(steps, np.concatenate([[0], logged.steps + 1]), np.concatenate([[0.0], logged.values]))

    def step_tokens(self) -> Curve | None:
        """Tokens of a step; where not every step was logged, the mean since the one before."""
        logged = self.curves.get("train/tokens")
        if logged is None:
            return None
        tokens = np.diff(logged.values, prepend=0.0)
        return Curve(logged.steps, tokens / np.diff(logged.steps, prepend=-1))


def read_run(folder: Path) -> Run:
    """Reads TensorBoard's events, or ``log.txt`` where there are none, and the configs.

    Raises:
        ValueError: there is nothing to read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: give that of a run, such as runs/quickstart")
    notes: list[str] = []
    configs = list(_read_configs(folder, notes))
    files = [_read_events(path, notes) for path in sorted(folder.glob("events.out.tfevents.*"), key=_order)]
    starts = [file.start() for file in files if file.times]
    curves = {tag: _curve(points) for tag, points in _join(files)}
    texts = dict(_join(files, texts=True))
    if not curves:
        curves = _read_log_txt(folder / "log.txt")
        if curves:
            step_tokens = configs[-1].get("data.total_batch_tokens") if configs else None
            taken = f"steps of {step_tokens or NANOGPT_STEP_TOKENS} tokens"
            notes.append(f"{folder} has no TensorBoard events: log.txt is shown, in {taken}")
    if not curves:
        inside = sorted({path.parent for path in folder.glob("*/events.out.tfevents.*")})
        mend = f"give {' '.join(map(str, inside))}" if inside else "give the folder of a run, such as runs/quickstart"
        raise UserError(f"{folder} has no TensorBoard events and no log.txt: {mend}")
    return Run(folder.absolute().name, curves, texts, starts, configs, notes)


def _order(events: Path) -> tuple[int, str]:
    """By the number of the start at the end of the name: the second in it, a clock may have turned round."""
    number = re.search(r"\.start(\d+)$", events.name)
    return (int(number[1]) if number else -1, events.name)


@dataclass
class _EventFile:
    scalars: dict[str, dict[int, float]] = field(default_factory=dict)
    texts: dict[str, dict[int, str]] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)  # of all events that carry a value
    purge_step: int | None = None  # from here on what earlier files hold is void

    def start(self) -> Start:
        steps = self.scalars.get("train/loss", {})
        seconds = max(self.times) - self.times[0]
        return Start(self.times[0], seconds, min(steps, default=-1), max(steps, default=-1))


def _read_events(path: Path, notes: list[str]) -> _EventFile:
    from google.protobuf.message import DecodeError
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    found, length = _EventFile(), 0
    try:
        for record in RawEventFileLoader(str(path)).Load():
            event = Event.FromString(record)
            length += len(record) + 16  # its length, and two checksums
            if event.session_log.status == SessionLog.START:
                found.purge_step = event.step
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found.scalars.setdefault(value.tag, {})[event.step] = value.simple_value
                elif value.tag.endswith("/text_summary"):
                    text = b"".join(value.tensor.string_val).decode(errors="replace")
                    found.texts.setdefault(value.tag.removesuffix("/text_summary"), {})[event.step] = text
                else:
                    continue
                found.times.append(event.wall_time)
    except DecodeError:
        pass  # the same as a record that is not whole
    if length != path.stat().st_size:
        last = max((step for points in found.scalars.values() for step in points), default=None)
        shown = "nothing of it is shown" if last is None else f"it is shown up to step {last}"
        notes.append(
            f"{path} ends inside a record, as that of a run that was killed or is writing now, or is damaged: {shown}"
        )
    return found


def _join(files: list[_EventFile], texts: bool = False) -> Iterator[tuple[str, dict[int, Any]]]:
    """Each tag's points over all files: a later file's word counts from the first step on that it has the tag at."""
    joined: dict[str, dict[int, Any]] = {}
    for file in files:
        if file.purge_step is not None:
            joined = {tag: _before(file.purge_step, points) for tag, points in joined.items()}
        later: dict[str, dict[int, Any]] = file.texts if texts else file.scalars  # type: ignore[assignment]
        for tag, points in later.items():
            joined[tag] = _before(min(points), joined.get(tag, {})) | points
    yield from ((tag, points) for tag, points in joined.items() if points)


def _before(step: int, points: dict[int, Any]) -> dict[int, Any]:
    return {s: value for s, value in points.items() if s < step}


def _read_log_txt(path: Path) -> dict[str, Curve]:
    found: dict[str, dict[int, float]] = {}
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    for line in lines:
        if match := re.fullmatch(r"(\d+) (train|val|hella) (\S+)", line):
            try:
                found.setdefault(LOG_WORDS[match[2]], {})[int(match[1])] = float(match[3])
            except ValueError:
                continue
    return {tag: _curve(points) for tag, points in found.items()}


def _curve(points: dict[int, float]) -> Curve:
    steps = sorted(points)
    return Curve(np.array(steps), np.array([points[step] for step in steps], dtype=float))


def _read_configs(folder: Path, notes: list[str]) -> Iterator[dict[str, str]]:
    for path in config_paths(folder):
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
            if not isinstance(config, dict):
                raise ValueError
        except (ValueError, yaml.YAMLError):
            notes.append(f"{path} is not the config of a run: it is left out")
            continue
        yield flat(config)


def config_paths(folder: Path) -> list[Path]:
    """config.yaml, config_1.yaml, … config_10.yaml: of each start of a run, the last one last."""
    paths = [path for path in folder.glob("config*.yaml") if re.fullmatch(r"config(_\d+)?", path.stem)]
    return sorted(paths, key=lambda path: (len(path.name), path.name))


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as ``model.optimizer.lr`` → ``0.006``, under the names that the command line takes."""
    found: dict[str, str] = {}
    for name, value in config.items():
        if name == "class_path":
            found[prefix.removesuffix(".")] = str(value)
        elif isinstance(value, dict) and value:
            found |= flat(value, prefix if name == "init_args" else f"{prefix}{name}.")
        else:
            found[prefix + str(name)] = _as_written(value)
    return found


def _as_written(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}"
    return str(value)
