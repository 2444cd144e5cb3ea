"""Our checkpoints, as Lightning writes them with ``torch.save``. Reading one never runs code from it."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2_lightning.errors import UserError
from gpt2_lightning.model import GPTConfig

MAGIC_BYTES = b"PK\x03\x04"  # torch.save writes a zip archive
RUN_KEYS = {"state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks", "global_step", "hyper_parameters"}
"""Keys that a checkpoint needs to resume a run from it."""


def read_weights(path: Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Config and memory-mapped weights of a checkpoint, by GPT's parameter names without the tied head.

    Raises:
        UserError: the file is damaged, or not one of our checkpoints.
    """
    checkpoint = torch_load(path)
    try:
        config = GPTConfig(**checkpoint["hyper_parameters"]["config"])
        entries = checkpoint["state_dict"].items()
    except (KeyError, TypeError, AttributeError):
        raise UserError(
            f"{path} is not a checkpoint of gpt2_lightning: it lacks state_dict or hyper_parameters.config; "
            "give one that `gpt2 fit` wrote, or a model folder"
        ) from None
    state = {name.removeprefix("model."): tensor for name, tensor in entries if name.startswith("model.")}
    state.pop("lm_head.weight", None)  # tied to transformer.wte.weight
    return config, state


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint to resume from. Checks the CRC of every byte, which torch does not.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is not a run's checkpoint, or it is damaged; the message then names the newest undamaged one
            beside it.
    """
    if not _is_whole(path):
        others = [other for other in reversed(saved_steps(path.parent)) if not other.samefile(path)]
        whole = next(filter(_is_whole, others), None)
        fix = f"resume from the one before it, --ckpt_path {whole}" if whole else "start anew in another run_dir"
        raise UserError(f"{path} is damaged or truncated: {fix}")
    checkpoint = torch_load(path, mmap=False)
    if not isinstance(checkpoint, dict) or not checkpoint.keys() >= RUN_KEYS:
        raise UserError(f"{path} is not a checkpoint of a run: to start from its weights, use model.init_from")
    return checkpoint


def saved_steps(folder: Path) -> list[Path]:
    """The ``step_*.ckpt`` files of a folder, earliest first. Names grow longer from step 1,000,000 on."""
    return sorted(folder.glob("step_*.ckpt"), key=lambda path: (len(path.name), path.name))


def torch_load(path: Path, mmap: bool = True) -> Any:
    """What ``torch.save`` wrote, on the CPU. Loads tensors and plain values only.

    Raises:
        UserError: the file is damaged, or contains other objects.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds more than tensors and plain values, and loading it could run code: "
            "give a checkpoint that `gpt2 fit` wrote, or safetensors"
        ) from None
    except Exception as error:  # the exception depends on which byte is damaged
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{path} is damaged or truncated ({reason}): use an earlier checkpoint, or fetch it again"
        ) from None


def _is_whole(path: Path) -> bool:
    """Whether the zip archive is complete and each CRC matches."""
    with path.open("rb") as file:
        try:
            return zipfile.ZipFile(file).testzip() is None
        except Exception:  # the exception depends on which byte is damaged
            return False
