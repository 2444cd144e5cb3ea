"""``export``: writes weights for other programs."""

from pathlib import Path
from typing import Literal

import torch

from gpt2_lightning.checkpoints import hf, llmc
from gpt2_lightning.checkpoints.load import load
from gpt2_lightning.checkpoints.ours import torch_load

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export(
    checkpoint: str | Path,
    out: str | Path,
    format: Literal["hf", "llmc"] = "hf",
    dtype: Literal["fp32", "bf16"] = "fp32",
) -> None:
    """Writes weights as a folder for ``transformers`` (hf), or as llm.c's ``.bin`` (llmc).

    Args:
        checkpoint: anything that ``load`` accepts. The model card of a run's checkpoint shows its metrics.
        out: the folder or file to write. An earlier export there is replaced.
        dtype: of the written weights.

    Raises:
        UserError: ``load`` raises it, or ``out`` holds something that is not an export.
    """
    torch_dtype = _DTYPES[dtype]
    model = load(checkpoint)
    if format == "llmc":
        llmc.write(model, Path(out), torch_dtype)
    else:
        hf.write_folder(model, Path(out), torch_dtype, _metrics(Path(checkpoint)))


def _metrics(checkpoint: Path) -> dict[str, str]:
    """Rows for the model card: the checkpoint's step and the metrics last logged before it."""
    if checkpoint.suffix != ".ckpt":
        return {}
    saved = torch_load(checkpoint.expanduser())
    if "global_step" not in saved:  # weights alone, in a checkpoint's layout
        return {}
    rows = {"checkpoint": checkpoint.name, "optimizer steps": f"{saved['global_step']:,}"}
    examples = saved.get("callbacks", {}).get("HellaSwag", {}).get("examples")
    for name, value in sorted(saved.get("metrics", {}).items()):
        if name.startswith(("val/", "hellaswag")) or name in ("train/loss", "train/tokens"):
            of = f" ({examples})" if examples and name.startswith("hellaswag") else ""
            rows[name] = f"{value:,.4f}".removesuffix(".0000") + of
    return rows
