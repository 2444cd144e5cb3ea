"""``load``: weights in any format → a ``GPT``."""

import re
from pathlib import Path

import torch
from torch import Tensor

from gpt2_lightning.checkpoints import hf, llmc, ours
from gpt2_lightning.errors import UserError
from gpt2_lightning.model import GPT, GPTConfig

_HUB_NAME = re.compile(r"(\w[\w.-]*(?:/\w[\w.-]*)?)(?:@(\w[\w./-]*))?", re.ASCII)  # [ORG/]NAME[@REVISION]


def load(name_or_path: str | Path, *, revision: str | None = None) -> GPT:
    """Loads GPT-2 weights: in eval mode, in float32, on the CPU. The number of vocabulary rows stays the file's own.

    Args:
        name_or_path: one of our checkpoints (``.ckpt``), a folder in Hugging Face's format (safetensors or torch
            files), an llm.c ``.bin``, or a name on the hub: ``gpt2``, ``gpt2-medium``, ``gpt2-large``, ``gpt2-xl``,
            ``ORG/NAME``, each with an optional ``@REVISION``.
        revision: branch, tag or commit of a hub name.

    Raises:
        UserError: nothing is found under this name, the file is damaged, or the architecture is not GPT-2.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        config, state = hf.read_folder(path)
    elif path.is_file():
        with path.open("rb") as file:
            magic = file.read(4)
        if magic == llmc.MAGIC_BYTES:
            config, state = llmc.read(path)
        elif magic == ours.MAGIC_BYTES:
            config, state = ours.read_weights(path)
        else:
            raise UserError(
                f"{path} is neither a checkpoint of gpt2_lightning nor an llm.c file: give one of those, or the folder "
                "that holds a Hugging Face model's config.json"
            )
    elif path.suffix not in (".ckpt", ".bin") and (match := _HUB_NAME.fullmatch(str(name_or_path))):
        name, pinned = match.groups()
        if pinned and revision not in (None, pinned):
            raise UserError(f"{name_or_path} and revision={revision} are two revisions: leave one of them out")
        config, state = hf.read_folder(hf.download(name, pinned or revision))
    else:
        raise UserError(f"{path} does not exist: give a checkpoint, a model folder, or a hub name such as gpt2")
    return _build(config, state, path)


def _build(config: GPTConfig, state: dict[str, Tensor], source: Path) -> GPT:
    """A GPT that holds ``state``, which has each parameter once (without the tied head)."""
    with torch.device("meta"):  # no memory and no random numbers for an initialisation that is replaced
        model = GPT(config)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            raise UserError(
                f"{source} does not hold the weights of {config}: the shape of {name} is {found.get(name, 'missing')}, "
                f"expected {expected.get(name, 'no such weight')}; it is damaged, incomplete or of another architecture"
            )
    # copies, so that the model outlives the memory-mapped file
    owned = {n: t.to(torch.float32, copy=True, memory_format=torch.contiguous_format) for n, t in state.items()}
    model.load_state_dict(owned, assign=True, strict=False)
    model.lm_head.weight = model.transformer.get_parameter("wte.weight")  # assign=True has untied them
    return model.eval()
