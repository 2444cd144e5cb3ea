"""The memory that a training step takes, by arithmetic on its shape, and what that shape counts.

It is that of eager PyTorch with fused attention, at the moment of the step where it is highest; ``tests/test_plan.py``
holds it against what PyTorch itself counts. ``torch.compile`` keeps about the same activations, and fewer logits.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gpt2_lightning.loss import ROWS, chunk_of
from gpt2_lightning.model import GPT, GPTConfig


def count_parameters(config: GPTConfig) -> tuple[int, int]:
    """(decayed, not decayed): matrices and embeddings; biases and LayerNorms. The tied head counts once."""
    C = config.n_embd
    embeddings = (config.vocab_size + config.block_size) * C
    biases = 3 * C + C + 4 * C + C  # c_attn, c_proj, c_fc, c_proj
    layer_norms = 2 * 2 * C
    return embeddings + block_matrices(config), config.n_layer * (biases + layer_norms) + 2 * C


def block_matrices(config: GPTConfig) -> int:
    """Weights in the matrices of the blocks: 3·C² + C² + 4·C² + 4·C² in each."""
    return config.n_layer * 12 * config.n_embd**2


def flops_per_token(config: GPTConfig) -> int:
    with torch.device("meta"):
        return GPT(config).flops_per_token()


def recomputed_flops_per_token(config: GPTConfig) -> int:
    """What activation checkpointing computes twice: the forward of the blocks, a third of all but the head."""
    return (flops_per_token(config) - 6 * config.vocab_size * config.n_embd) // 3


@dataclass(frozen=True)
class Step:
    """How a device computes a step: what its memory depends on, beside the shape and the micro-batch."""

    weight_bytes: int = 4
    """Of a parameter; the residual stream and LayerNorm have its type, also under autocast."""
    activation_bytes: int = 4
    """Of what a matmul reads and writes."""
    optimizer: str = "AdamW"
    """Its class's name."""
    optimizer_args: Mapping[str, Any] | None = None
    chunked_loss: bool = False
    compiled: bool = False
    activation_checkpointing: bool = False
    cpu: bool = False
    ddp: bool = False
    """Several processes, each with all weights: gradients are kept twice, the second time in DDP's buckets."""
    shards: int = 1
    """Devices that share weights, gradients and optimizer state: 1 unless the strategy is fully_shard."""


def memory(config: GPTConfig, micro_batch_size: int, step: Step) -> dict[str, int]:
    """Bytes on each device by part, where their sum is highest: when the gradient of the logits is computed."""
    parameters = sum(count_parameters(config))
    tokens = micro_batch_size * config.block_size
    logits = logits_bytes(config, tokens, step)
    activations = activations_bytes(config, tokens, step)
    if step.activation_checkpointing:
        block = block_bytes(config, tokens, step)
        # a block is computed again when whole logits are gone: only what it takes beyond them comes on top
        activations += block if step.chunked_loss else max(0, block - logits)
    parts = {
        "weights": step.weight_bytes * parameters // step.shards,
        "weights in 16 bits": autocast_copies_bytes(config, step),
        "gathered weights": 0 if step.shards == 1 else step.weight_bytes * _gathered(config),
        "gradients": step.weight_bytes * parameters // step.shards,
        "DDP's buckets": step.weight_bytes * parameters if step.ddp else 0,
        "optimizer": optimizer_bytes(config, step) // step.shards,
        "activations": activations,
        "logits": logits,
    }
    return {name: size for name, size in parts.items() if size}


def _gathered(config: GPTConfig) -> int:
    """Parameters that fully sharded training has whole at a time: the embeddings, a block, and the next one."""
    return (config.vocab_size + config.block_size) * config.n_embd + 2 * 12 * config.n_embd**2


def autocast_copies_bytes(config: GPTConfig, step: Step) -> int:
    """The 16-bit copies of what autocast multiplies with, kept through the forward: matrices, biases, the head."""
    if step.activation_bytes == step.weight_bytes:
        return 0
    biases = config.n_layer * 9 * config.n_embd
    return step.activation_bytes * (block_matrices(config) + biases + config.vocab_size * config.n_embd)


OPTIMIZERS = ("AdamW", "Adam", "NAdam", "RAdam", "Adamax", "Muon", "SGD")
"""Those whose state is known; any other is taken to keep as much as AdamW."""


def optimizer_bytes(config: GPTConfig, step: Step) -> int:
    """AdamW keeps two numbers per parameter; Muon one for the matrices of the blocks; SGD one, if it has momentum."""
    parameters = sum(count_parameters(config))
    args = step.optimizer_args or {}
    if step.optimizer == "SGD":
        numbers = parameters if args.get("momentum") else 0
    elif step.optimizer == "Muon":
        numbers = 2 * parameters - block_matrices(config)
    else:
        numbers = (3 if args.get("amsgrad") else 2) * parameters
    return step.weight_bytes * numbers


def block_bytes(config: GPTConfig, tokens: int, step: Step) -> int:
    """What autograd keeps of one block, its input included: per token, with C = n_embd,

    - the inputs of the two LayerNorms, 2·C, with their means and deviations, 4 numbers in fp32;
    - 14·C in the type of the matmuls: what c_attn and c_fc read (2·C), q, k, v (3·C), the attention's output, which is
      what c_proj reads (C), the GELU's input and output (8·C);
    - one fp32 number per head, the log-sum-exp from which fused attention computes its T×T weights again.
    """
    C = config.n_embd
    per_token = 2 * C * step.weight_bytes + 4 * 4 + 14 * C * step.activation_bytes + 4 * config.n_head
    return tokens * per_token


def activations_bytes(config: GPTConfig, tokens: int, step: Step) -> int:
    """What autograd keeps from the embedding to the head, logits left out; of a checkpointed block only its input."""
    C = config.n_embd
    block = tokens * C * step.weight_bytes if step.activation_checkpointing else block_bytes(config, tokens, step)
    # ln_f's input, mean and deviation; what the head reads; token ids and targets, int64
    ends = tokens * (C * step.weight_bytes + 2 * 4 + C * step.activation_bytes + 2 * 8)
    return config.n_layer * block + ends


def logits_bytes(config: GPTConfig, tokens: int, step: Step) -> int:
    """The logits and what is computed from them, where that is largest.

    Whole: the log-softmax in the type of the weights (fp32 under autocast), its gradient, and the logits' gradient.
    Compiled: the logits and their gradient in the type of the matmuls. In chunks (``loss.py``): the buffers of a chunk,
    and the gradients of head and hidden states, which are there before the backward begins.
    """
    V, C = config.vocab_size, config.n_embd
    if not step.chunked_loss and step.compiled:
        return 2 * step.activation_bytes * V * tokens
    if not step.chunked_loss:
        return 3 * step.weight_bytes * V * tokens
    chunk = min(chunk_of(V), tokens)
    rows = min(ROWS, chunk) if step.cpu else chunk
    mixed = step.activation_bytes != step.weight_bytes
    head = V * C * (step.weight_bytes + (step.activation_bytes if mixed else 0))  # its gradient, and that of a chunk
    hidden = tokens * C * step.weight_bytes * (2 if mixed else 1)  # their gradient; in fp32 too, beside what is kept
    return chunk * V * step.activation_bytes + rows * V * 4 + head + hidden
