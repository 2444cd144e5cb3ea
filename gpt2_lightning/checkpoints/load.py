"""The one door to weights: ``load`` opens them, ``export`` writes them for others."""

import re
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gpt2_lightning.checkpoints import hf, hf_export, llmc
from gpt2_lightning.checkpoints.ours import torch_load
from gpt2_lightning.errors import UserError
from gpt2_lightning.model import GPT, GPTConfig
from gpt2_lightning.tools.runs import read_run

_SHAPE = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
_HUB_NAME = re.compile(r"(\w[\w.-]*(?:/\w[\w.-]*)?)(?:@(\w[\w./-]*))?", re.ASCII)  # and a revision
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_ZIP_MAGIC = b"PK\x03\x04"  # torch.save writes a zip archive


def load(name_or_path: str | Path, *, revision: str | None = None) -> GPT:
    """Open GPT-2 weights: in eval mode, in float32, on the CPU. Their own number of vocabulary rows is kept.

    Args:
        name_or_path: a checkpoint of ours (``.ckpt``), a folder in Hugging Face's format (an export of ours, or any
            GPT-2 as safetensors or torch files), an llm.c ``.bin``, or a name on the hub: ``gpt2``, ``gpt2-medium``,
            ``gpt2-large``, ``gpt2-xl``, ``ORG/NAME``.
        revision: branch, tag or commit of a hub name.

    Raises:
        ValueError: there is nothing under this name; the file is damaged, or is not ours; the architecture is another.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        config, state = hf.read_folder(path)
    elif path.is_file():
        with path.open("rb") as file:
            magic = file.read(4)
        if magic == llmc.MAGIC_BYTES:
            config, state = llmc.read(path)
        elif magic == _ZIP_MAGIC:
            config, state = _read_checkpoint(path)
        else:
            raise UserError(
                f"{path} is neither a checkpoint of gpt2_lightning nor an llm.c file: give one of those, or the folder "
                "that holds a Hugging Face model's config.json"
            )
    elif isinstance(name_or_path, str) and (
        (match := _HUB_NAME.fullmatch(name_or_path)) and path.suffix not in (".ckpt", ".bin")
    ):
        name, pinned = match.groups()
        if pinned and revision not in (None, pinned):
            raise UserError(f"{name_or_path} and revision={revision} are two revisions: leave one of them out")
        config, state = hf.read_folder(hf.download(name, pinned or revision))
    else:
        raise UserError(f"{path} does not exist: give a checkpoint, a model folder, or a hub name such as gpt2")
    return _build(config, state, path)


def export(
    checkpoint: str | Path,
    out: str | Path,
    format: Literal["hf", "llmc"] = "hf",
    dtype: Literal["fp32", "bf16"] = "fp32",
) -> None:
    """Write weights for others to open: a folder for ``transformers`` (hf), or llm.c's ``.bin`` (llmc).

    Args:
        checkpoint: whatever ``load`` opens; where it lies in its run's folder, the model card tells the run's figures.
        out: the folder or file to write; an earlier export there is replaced.
        dtype: of the written weights.

    Raises:
        ValueError: what ``load`` raises; an unknown format or dtype; ``out`` holds something else.
    """
    if format not in ("hf", "llmc"):
        raise UserError(f"format is {format!r}: give hf or llmc")
    if dtype not in _DTYPES:
        raise UserError(f"dtype is {dtype!r}: give fp32 or bf16")
    model = load(checkpoint)
    if format == "llmc":
        llmc.write(model, Path(out), _DTYPES[dtype])
    else:
        hf_export.export_folder(model, Path(out), _DTYPES[dtype], _figures(Path(checkpoint)))


def _figures(checkpoint: Path) -> dict[str, str]:
    """What the run had measured when it wrote ``checkpoint``: its steps, and the last values of its TensorBoard log."""
    if checkpoint.suffix != ".ckpt":
        return {}
    saved = torch_load(checkpoint)
    step = saved.get("global_step")
    if step is None:  # weights alone, in a checkpoint's layout
        return {}
    figures = {"checkpoint": checkpoint.name, "optimizer steps": f"{step:,}"}
    run_dir = checkpoint.absolute().parent.parent  # runs/X/checkpoints/last.ckpt
    if not any(run_dir.glob("events.out.tfevents.*")):
        return figures
    examples = saved.get("callbacks", {}).get("HellaSwag", {}).get("examples", "rows unknown")
    for tag, curve in sorted(read_run(run_dir).curves.items()):
        before = curve.steps <= step - tag.startswith("train/")  # the first of train/*, at 0, is of one update
        if before.any() and (tag.startswith(("val/", "hellaswag")) or tag in ("train/loss", "train/tokens")):
            where = f"step {curve.steps[before][-1]:,}" + (f"; {examples}" if tag.startswith("hellaswag") else "")
            figures[tag] = f"{curve.values[before][-1]:,.4f}".removesuffix(".0000") + f" ({where})"
    return figures


def _read_checkpoint(path: Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    checkpoint = torch_load(path)
    shape = _shape_in(checkpoint)
    if shape is None:
        raise UserError(
            f"{path} is no checkpoint of gpt2_lightning: it lacks state_dict or hyper_parameters.config, so give one "
            "that `gpt2 fit` wrote, or a model folder"
        )
    prefix = "model."
    state = {
        name.removeprefix(prefix): t
        for name, t in checkpoint["state_dict"].items()
        if isinstance(t, Tensor) and str(name).startswith(prefix)
    }
    state.pop("lm_head.weight", None)  # tied to transformer.wte.weight
    return GPTConfig(**shape), state


def _shape_in(checkpoint: Any) -> dict[str, int] | None:
    try:
        checkpoint["state_dict"].items()
        shape = checkpoint["hyper_parameters"]["config"]
        return {name: int(shape[name]) for name in _SHAPE}
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, IndexError):
        return None


def _build(config: GPTConfig, state: dict[str, Tensor], source: Path) -> GPT:
    """A GPT that holds ``state``, which names each parameter once (the tied head not at all)."""

    def require(name: str, *shape: int) -> None:
        if name not in state:
            raise UserError(f"{source} lacks {name}: it is damaged, or its shape is not {config}")
        if tuple(state[name].shape) != shape:
            raise UserError(
                f"{source}: {name} is {tuple(state[name].shape)} where {config} asks for {shape}: "
                "the file is damaged, or its configuration belongs to other weights"
            )

    # first what tells the whole shape: a damaged one may ask for a network that takes hours to set up
    require("transformer.wte.weight", config.vocab_size, config.n_embd)
    require("transformer.wpe.weight", config.block_size, config.n_embd)
    require(f"transformer.h.{config.n_layer - 1}.ln_1.weight", config.n_embd)
    with torch.device("meta"):  # no memory and no random numbers for an initialisation that nobody sees
        model = GPT(config)
    for name, parameter in model.named_parameters():
        require(name, *parameter.shape)
    if extra := sorted(state.keys() - dict(model.named_parameters()).keys()):
        raise UserError(f"{source} holds {extra[0]}, for which GPT-2 has no place: it is another architecture")
    # copies, so that the model outlives the memory-mapped file
    owned = {n: t.to(torch.float32, copy=True, memory_format=torch.contiguous_format) for n, t in state.items()}
    model.load_state_dict(owned, assign=True, strict=False)
    model.lm_head.weight = model.transformer.get_parameter("wte.weight")  # assignment put a new one in its place
    return model.eval()
