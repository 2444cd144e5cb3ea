"""Memory of a training step, calculated from the model's shape. Parameter and FLOP counts.

The formulas describe eager PyTorch with fused attention at the step's peak. ``tests/unit/test_memory.py`` compares them
with what PyTorch allocates. With ``torch.compile`` the activations stay about the same and the logits take less.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gpt2_lightning.loss import SOFTMAX_ROWS, tokens_per_chunk
from gpt2_lightning.model import GPT, GPTConfig


@dataclass(frozen=True)
class StepSetup:
    """How a device computes a step, as far as its memory depends on it."""

    weight_bytes: int = 4
    """Per parameter. The residual stream and LayerNorm use this type too, also under autocast."""
    activation_bytes: int = 4
    """Per input or output element of a matmul."""
    optimizer: str = "AdamW"
    """Class name."""
    optimizer_args: Mapping[str, Any] | None = None
    chunked_loss: bool = False
    compiled: bool = False
    activation_checkpointing: bool = False
    cpu: bool = False
    ddp: bool = False
    """DDP with buckets of its own, which hold a second copy of the gradients."""
    shards: int = 1
    """Devices that share weights, gradients and optimizer state; above 1 with fully_shard only."""


def count_parameters(config: GPTConfig) -> tuple[int, int]:
    """Parameters with decay (matrices, embeddings) and without (biases, LayerNorms). The tied head counts once."""
    C = config.n_embd
    embeddings = (config.vocab_size + config.block_size) * C
    biases = 3 * C + C + 4 * C + C  # c_attn, c_proj, c_fc, c_proj
    layer_norms = 2 * 2 * C
    return embeddings + block_matrices(config), config.n_layer * (biases + layer_norms) + 2 * C


def block_matrices(config: GPTConfig) -> int:
    """Parameters in the matrices of all blocks: 3·C² + C² + 4·C² + 4·C² each."""
    return config.n_layer * 12 * config.n_embd**2


def flops_per_token(config: GPTConfig) -> int:
    with torch.device("meta"):
        return GPT(config).flops_per_token()


def recomputed_flops_per_token(config: GPTConfig) -> int:
    """FLOPs that activation checkpointing adds: the forward of the blocks, a third of everything but the head."""
    return (flops_per_token(config) - 6 * config.vocab_size * config.n_embd) // 3


def memory(config: GPTConfig, micro_batch_size: int, step: StepSetup) -> dict[str, int]:
    """Bytes per device by part at the peak of the step, which is when the gradient of the logits is computed."""
    parameters = sum(count_parameters(config))
    tokens = micro_batch_size * config.block_size
    logits = logits_bytes(config, tokens, step)
    activations = activations_bytes(config, tokens, step)
    if step.activation_checkpointing:
        block = block_bytes(config, tokens, step)
        # a block is recomputed after whole logits have been freed: only what exceeds them adds to the peak
        activations += block if step.chunked_loss else max(0, block - logits)
    # fully_shard gathers the embeddings, the current block and the next one
    gathered = (config.vocab_size + config.block_size) * config.n_embd + 2 * 12 * config.n_embd**2
    parts = {
        "weights": step.weight_bytes * parameters // step.shards,
        "weights in 16 bits": autocast_copies_bytes(config, step),
        "gathered weights": step.weight_bytes * gathered if step.shards > 1 else 0,
        "gradients": step.weight_bytes * parameters // step.shards,
        "DDP's buckets": step.weight_bytes * parameters if step.ddp else 0,
        "optimizer": optimizer_bytes(config, step) // step.shards,
        "activations": activations,
        "logits": logits,
    }
    return {name: size for name, size in parts.items() if size}


def autocast_copies_bytes(config: GPTConfig, step: StepSetup) -> int:
    """16-bit copies of matrices, biases and head, which autocast caches during the forward pass."""
    if step.activation_bytes == step.weight_bytes:
        return 0
    biases = config.n_layer * 9 * config.n_embd
    return step.activation_bytes * (block_matrices(config) + biases + config.vocab_size * config.n_embd)


OPTIMIZERS = ("AdamW", "Adam", "NAdam", "RAdam", "Adamax", "Muon", "SGD")
"""Optimizers with a known state size. Any other is assumed to need as much as AdamW."""


def optimizer_bytes(config: GPTConfig, step: StepSetup) -> int:
    """Optimizer state. Per parameter AdamW keeps two numbers, Muon one for the matrices of the blocks, SGD one with
    momentum."""
    parameters = sum(count_parameters(config))
    args = step.optimizer_args or {}
    if step.optimizer == "SGD":
        numbers = parameters if args.get("momentum") else 0
    elif step.optimizer == "Muon":
        numbers = 2 * parameters - block_matrices(config)
    else:
        numbers = (3 if args.get("amsgrad") else 2) * parameters
    return step.weight_bytes * numbers


def block_bytes(config: GPTConfig, tokens: int, step: StepSetup) -> int:
    """What autograd saves of one block, including its input. Per token, with C = n_embd:

    - the inputs of the two LayerNorms, 2·C, and their means and reciprocal deviations, 4 numbers in fp32;
    - 14·C in the type of the matmuls: inputs of c_attn and c_fc (2·C), q, k, v (3·C), attention output, which is the
      input of c_proj (C), input and output of the GELU (8·C);
    - one fp32 number per head: the log-sum-exp from which fused attention recomputes its T×T weights.
    """
    C = config.n_embd
    per_token = 2 * C * step.weight_bytes + 4 * 4 + 14 * C * step.activation_bytes + 4 * config.n_head
    return tokens * per_token


def activations_bytes(config: GPTConfig, tokens: int, step: StepSetup) -> int:
    """What autograd saves from the embedding to the head, without the logits. Of a checkpointed block: its input."""
    C = config.n_embd
    block = tokens * C * step.weight_bytes if step.activation_checkpointing else block_bytes(config, tokens, step)
    # ln_f's input, mean and reciprocal deviation; the head's input; token ids and targets, int64
    ends = tokens * (C * step.weight_bytes + 2 * 4 + C * step.activation_bytes + 2 * 8)
    return config.n_layer * block + ends


def logits_bytes(config: GPTConfig, tokens: int, step: StepSetup) -> int:
    """The logits and what is computed from them, at the peak.

    Whole: the log-softmax in the type of the weights (fp32 under autocast), its gradient, and the gradient of the
    logits. Compiled: the logits and their gradient in the type of the matmuls. In chunks (``loss.py``): the buffers of
    one chunk, and the gradients of head and hidden states, which are computed in the forward pass.
    """
    V, C = config.vocab_size, config.n_embd
    if not step.chunked_loss and step.compiled:
        return 2 * step.activation_bytes * V * tokens
    if not step.chunked_loss:
        return 3 * step.weight_bytes * V * tokens
    chunk = min(tokens_per_chunk(V), tokens)
    rows = min(SOFTMAX_ROWS, chunk) if step.cpu else chunk
    mixed = step.activation_bytes != step.weight_bytes
    head = V * C * (step.weight_bytes + (step.activation_bytes if mixed else 0))  # its gradient, and that of one chunk
    hidden = tokens * C * step.weight_bytes * (2 if mixed else 1)  # their gradient; in fp32 also beside the saved ones
    return chunk * V * step.activation_bytes + rows * V * 4 + head + hidden
