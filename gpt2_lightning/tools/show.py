"""The text that a step of a run trained on, to look behind a spike of its loss."""

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from gpt2_lightning.data.order import dataset_indices, sequences_per_shard
from gpt2_lightning.data.shards import TokenStream, list_shards
from gpt2_lightning.errors import UserError
from gpt2_lightning.schedule import BatchSizeSchedule, batch_size_stages, tokens_before
from gpt2_lightning.tokenizer import VOCAB_SIZE, get_tokenizer
from gpt2_lightning.tools.runs import config_paths


def show_step(run_dir: Path, step: int) -> str:
    """The samples of ``step`` as text, each under a line that says which window of the training split it is.

    Raises:
        ValueError: ``run_dir`` is not a run's, or its data is no longer where it was.
    """
    data, T = _data_of(run_dir)
    schedule = data["batch_size_schedule"]
    stages = batch_size_stages(data["total_batch_tokens"], schedule and BatchSizeSchedule(**schedule))
    samples = np.arange(tokens_before(step, stages) // T, tokens_before(step + 1, stages) // T)
    stream = TokenStream(list_shards(Path(data["root"]), "train"))
    windows = dataset_indices(samples, sequences_per_shard(stream.lengths, T), data["order"], data["seed"])
    texts = map(_decoded, stream.read(windows * T, T))
    heads = (f"── step {step}, sample {i}: train window {w} ──" for i, w in zip(samples, windows, strict=True))
    return "\n".join(f"{head}\n{text}" for head, text in zip(heads, texts, strict=True))


def _data_of(run_dir: Path) -> tuple[dict[str, Any], int]:
    """The ``data`` section of a run's last start, by the config that it left in its folder, and the block_size."""
    paths = config_paths(run_dir)
    if not paths:
        raise UserError(f"{run_dir} is not the folder of a run, there is no config.yaml: give one as runs/quickstart")
    try:
        config = yaml.safe_load(paths[-1].read_text(encoding="utf-8"))
        data = config["data"].get("init_args", config["data"])  # where it is a class of the user's own
        needed = {name: data[name] for name in ("root", "total_batch_tokens", "order", "seed", "batch_size_schedule")}
        return needed, config["model"]["config"]["block_size"]
    except (AttributeError, KeyError, TypeError, ValueError, yaml.YAMLError):
        raise UserError(f"{paths[-1]} is not the config of a run: give a folder that `gpt2 fit` has left") from None


def _decoded(tokens: np.ndarray) -> str:
    """Text of token ids; one that GPT-2's vocabulary does not have stands as ``<50300>``."""
    runs = np.split(tokens, np.flatnonzero(np.diff(tokens >= VOCAB_SIZE)) + 1)
    known = get_tokenizer().decode
    return "".join(known(run.tolist()) if run[0] < VOCAB_SIZE else "".join(f"<{t}>" for t in run) for run in runs)
