"""The text that a step of a run trained on: where to look when its loss jumps."""

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
    """The sequences of ``step`` as text, each under a line with its number in the run and in the training split.

    Raises:
        UserError: ``run_dir`` is not the folder of a run, or its data is gone.
    """
    data, T = _settings(run_dir)
    schedule = data["batch_size_schedule"]
    stages = batch_size_stages(data["total_batch_tokens"], schedule and BatchSizeSchedule(**schedule))
    run_indices = np.arange(tokens_before(step, stages) // T, tokens_before(step + 1, stages) // T)
    stream = TokenStream(list_shards(Path(data["root"]), "train"))
    indices = dataset_indices(run_indices, sequences_per_shard(stream.lengths, T), data["order"], data["seed"])
    lines = []
    for run_index, index, tokens in zip(run_indices, indices, stream.read(indices * T, T), strict=True):
        lines += [f"── step {step}, sequence {run_index}: train sequence {index} ──", _decode(tokens)]
    return "\n".join(lines)


def _settings(run_dir: Path) -> tuple[dict[str, Any], int]:
    """The ``data`` section of the config that the run's last start saved, and the block_size."""
    paths = config_paths(run_dir)
    if not paths:
        raise UserError(
            f"{run_dir} is not the folder of a run: it has no config.yaml; give one such as runs/quickstart"
        )
    config = yaml.safe_load(paths[-1].read_text(encoding="utf-8"))
    try:
        data = config["data"].get("init_args", config["data"])  # a data class of the user's own has init_args
        needed = {name: data[name] for name in ("root", "total_batch_tokens", "order", "seed", "batch_size_schedule")}
        return needed, config["model"]["config"]["block_size"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{paths[-1]} is not the config of a run: give a folder that `gpt2 fit` wrote") from error


def _decode(tokens: np.ndarray) -> str:
    """Text of token ids; ids beyond GPT-2's vocabulary are shown as ``<50300>``."""
    known = tokens < VOCAB_SIZE
    pieces = np.split(tokens, np.flatnonzero(np.diff(known)) + 1)  # each piece is all known or all unknown
    decode = get_tokenizer().decode
    return "".join(decode(p.tolist()) if p[0] < VOCAB_SIZE else "".join(f"<{t}>" for t in p) for p in pieces)
