"""What ``torch.save`` wrote, opened: nothing in it is executed, and damage is told in a sentence."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from gpt2_lightning.errors import UserError

PARTS = {"state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks", "global_step", "hyper_parameters"}
"""What a run needs of its checkpoint to go on."""


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint to resume from, every byte of it compared with its checksum: torch itself does not look at them.

    Raises:
        ValueError: there is none, it is not a run's, or it is damaged; then with the newest beside it that is whole.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {what}: correct ckpt_path, or leave it out")
    damage = _damage(path)
    if damage is not None:
        before = [p for p in saved_steps(path.parent) if not p.samefile(path)]
        whole = next((p for p in reversed(before) if _damage(p) is None), None)
        mend = f"go on from the one before it, --ckpt_path {whole}" if whole else "start anew in another run_dir"
        raise UserError(f"{path} is damaged ({damage}): {mend}")
    checkpoint = torch_load(path, mmap=False)
    if not (
        isinstance(checkpoint, dict)
        and checkpoint.keys() >= PARTS
        and "config" in (checkpoint["hyper_parameters"] or {})
    ):
        raise UserError(f"{path} is no checkpoint of a gpt2_lightning run: to start from its weights, use init_from")
    return checkpoint


def saved_steps(folder: Path) -> list[Path]:
    """The ``step_*.ckpt`` of a folder, the earliest first; from the millionth step on their names are longer."""
    return sorted(folder.glob("step_*.ckpt"), key=lambda path: (len(path.name), path.name))


def _damage(path: Path) -> str | None:
    """What is wrong with a file that ``torch.save`` wrote, or None."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except PermissionError:
        raise
    except Exception as error:  # what a damaged archive raises depends on the byte
        return str(error) or type(error).__name__
    return broken and f"the checksum of {broken} does not fit"


def torch_load(path: Path, mmap: bool = True) -> Any:
    """What ``torch.save`` wrote, on the CPU, memory-mapped or read: tensors and plain values only, no code is run.

    Raises:
        ValueError: the file is damaged, or asks for more than plain values.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds more than tensors and plain values: it is not a file of ours, and stays shut"
        ) from None
    except Exception as error:  # what a damaged pickle raises depends on the byte
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} is damaged or cut short ({reason}): take an earlier checkpoint or fetch it again"
        ) from None
