"""Training data as text: windows by their number, or what a step of a run saw, to look behind a spike of its loss."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from gpt2_lightning.data.order import Order, windows_in_shards, windows_of
from gpt2_lightning.data.shards import TokenStream, list_shards
from gpt2_lightning.run_folder import config_files
from gpt2_lightning.schedule import BatchSizeSchedule, batch_size_stages, tokens_before
from gpt2_lightning.tokenizer import VOCAB_SIZE, get_tokenizer


@dataclass(frozen=True)
class StepData:
    """What decides the tokens of a step; the names are those of a recipe's ``data`` section."""

    root: Path
    block_size: int = 1024
    total_batch_tokens: int = 524288
    order: Order = "sequential"
    seed: int = 1337
    batch_size_schedule: BatchSizeSchedule | None = None


def of_run(run_dir: Path) -> StepData:
    """The settings of a run's last start, by the config that it left in its folder.

    Raises:
        ValueError: that file is not a run's.
    """
    path = config_files(run_dir)[-1]
    try:
        config = yaml.safe_load(path.read_text())
        data = config["data"].get("init_args", config["data"])  # where it is a class of the user's own
        schedule = data["batch_size_schedule"]
        return StepData(
            Path(data["root"]),
            config["model"]["config"]["block_size"],
            data["total_batch_tokens"],
            data["order"],
            data["seed"],
            schedule and BatchSizeSchedule(**schedule),
        )
    except (AttributeError, KeyError, TypeError, ValueError, yaml.YAMLError):
        raise ValueError(
            f"{path} is not the config of a run: name the folder of its data instead, with --block_size and the others"
        ) from None


def show_step(step: int, data: StepData) -> str:
    """The samples of a step as text, each under a line that says which window of the training split it is.

    Raises:
        ValueError: there is no such step or no such data.
    """
    if data.total_batch_tokens % data.block_size != 0:
        raise ValueError(
            f"--total_batch_tokens {data.total_batch_tokens} is not a multiple of {data.block_size}: give one, or "
            "another --block_size"
        )
    stages = batch_size_stages(data.total_batch_tokens, data.batch_size_schedule)
    first, end = (tokens_before(s, stages) // data.block_size for s in (step, step + 1))
    stream = TokenStream(list_shards(data.root, "train"))
    counts = windows_in_shards(stream.lengths, data.block_size)
    if sum(counts) == 0:
        raise ValueError(f"{data.root} has no training window of {data.block_size} tokens: lower --block_size")
    samples = np.arange(first, end)
    windows = windows_of(samples, counts, data.order, data.seed)
    heads = [f"step {step}, sample {i}: train window {w}" for i, w in zip(samples, windows, strict=True)]
    return _as_text(stream, windows, data.block_size, heads)


def show_windows(root: Path, first: int, count: int, block_size: int) -> str:
    """Windows ``first`` to ``first + count`` of the training split in file order as text, each under its number.

    Raises:
        ValueError: there are none.
    """
    stream = TokenStream(list_shards(root, "train"))
    n_windows = len(stream) // block_size
    if n_windows == 0:
        raise ValueError(f"{root} has no training window of {block_size} tokens: lower --block_size")
    if not 0 <= first < n_windows:
        raise ValueError(
            f"there is no train window {first} of {block_size} tokens in {root}: give --first from 0 to {n_windows - 1}"
        )
    windows = np.arange(first, min(first + count, n_windows))
    return _as_text(stream, windows, block_size, [f"train window {window}" for window in windows])


def _as_text(stream: TokenStream, windows: np.ndarray, block_size: int, heads: list[str]) -> str:
    texts = map(_decoded, stream.windows(windows * block_size, block_size))
    return "\n".join(f"── {head} ──\n{text}" for head, text in zip(heads, texts, strict=True))


def _decoded(tokens: np.ndarray) -> str:
    """Text of token ids; one that GPT-2's vocabulary does not have stands as ``<50300>``."""
    runs = np.split(tokens, np.flatnonzero(np.diff(tokens >= VOCAB_SIZE)) + 1)
    known = get_tokenizer().decode
    return "".join(known(run.tolist()) if run[0] < VOCAB_SIZE else "".join(f"<{t}>" for t in run) for run in runs)
