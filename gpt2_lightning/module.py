"""The training step around the network: loss, compile, optimizer set-up. When to evaluate and log is the callbacks'."""

import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.memory import garbage_collection_cuda
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchmetrics import MeanMetric

from gpt2_lightning.checkpoints.load import load
from gpt2_lightning.compile_cache import keep_compiled_code
from gpt2_lightning.errors import UserError
from gpt2_lightning.loss import LinearCrossEntropy, chunk_of
from gpt2_lightning.model import GPT, GPTConfig
from gpt2_lightning.optim import AdamW, decay_groups
from gpt2_lightning.schedule import WarmupCosine
from gpt2_lightning.sharding import shard
from gpt2_lightning.tokenizer import VOCAB_SIZE
from gpt2_lightning.tools.gpus import is_out_of_memory


def attends_by_matmuls(device_type: str, bf16: bool, block_size: int) -> bool:
    """Whether attention is faster as matmuls and a softmax than fused: on a CPU, for bf16 and short contexts.

    There the fused kernel takes 3.0 ms, forward and backward, where matmuls, which PyTorch makes in fp32, take 1.6
    (B=4, T=128, 4 heads of 16, two cores of an AMD EPYC); from T=256 on it is as fast or faster.
    """
    return device_type == "cpu" and bf16 and block_size <= 128


class GPTModule(LightningModule):
    """GPT-2 in training. Batches are (micro_batch_size, block_size + 1) token ids of any integer type.

    Args:
        config: the shape; null takes that of ``init_from``, or GPT-2 (124M) without it.
        init_from: weights to start from, by whatever ``load`` opens: gpt2, gpt2-medium, gpt2-large, gpt2-xl, a
            checkpoint, an exported folder. A ``config`` that is typed as well has to agree with theirs.
        optimizer: a class and its arguments. Biases and LayerNorms are never decayed, whatever its ``weight_decay``.
        lr_scheduler: a class and its arguments, stepped once per optimizer step; a ``max_steps`` of null among them
            becomes ``trainer.max_steps``.
        compile: torch.compile the training step: auto does so on CUDA.
        activation_checkpointing: compute each block again in the backward pass rather than keep it: the same losses, a
            quarter to a third slower, for models that do not fit otherwise.
        chunked_loss: never hold the whole logits (see ``loss.py``): auto does so on a CPU, where it is faster; on a
            small GPU it saves memory.
    """

    def __init__(
        self,
        config: GPTConfig | None = None,
        init_from: str | None = None,
        optimizer: OptimizerCallable = lambda params: AdamW(params),
        lr_scheduler: LRSchedulerCallable = lambda optimizer: WarmupCosine(optimizer),
        compile: Literal["auto"] | bool = "auto",
        chunked_loss: Literal["auto"] | bool = "auto",
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(config, dict):  # as `load_from_checkpoint` gives it back
            config = GPTConfig(**config)
        self.model = GPT(config or GPTConfig()) if init_from is None else load(init_from).train()
        if config is not None and (config.vocab_size, self.model.config.vocab_size) == (50304, VOCAB_SIZE):
            config = replace(config, vocab_size=VOCAB_SIZE)  # 50304 is what a config without a vocab_size says
        if config is not None and config != self.model.config:
            raise UserError(
                f"model.config differs from the weights of {init_from}: "
                f"{_differences(asdict(config), asdict(self.model.config))}; "
                "set model.config to null to take the weights' own shape"
            )
        self.model.activation_checkpointing = activation_checkpointing
        self.save_hyperparameters({"config": asdict(self.model.config)})
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.compile_mode = compile
        self.chunked_loss = chunked_loss
        self.val_loss = MeanMetric()
        self.loss_sum = torch.zeros(())  # over the micro-batches of the step so far, on this rank
        self.step_loss = torch.zeros(())  # of the last step: the mean over its micro-batches and ranks
        self.grad_norm = torch.zeros(())  # of the last step, before clipping
        self.step_applied = True  # false where loss or norm of the last step was not finite

    def setup(self, stage: str) -> None:
        if self.trainer.gradient_clip_algorithm == "value":
            raise UserError(
                "trainer.gradient_clip_algorithm is value: GPT-2 is clipped by the global norm, leave it out"
            )
        device_type = self.trainer.strategy.root_device.type
        chunked = device_type == "cpu" if self.chunked_loss == "auto" else self.chunked_loss
        self.loss = LinearCrossEntropy(chunk_of(self.model.config.vocab_size) if chunked else None)
        compiled = (
            device_type == "cuda" and sys.platform != "win32" if self.compile_mode == "auto" else self.compile_mode
        )
        if compiled:
            keep_compiled_code()
            # a code for each micro-batch that a batch-size schedule grows through, and for those of evaluation
            torch._dynamo.config.recompile_limit = 64
        # a handle beside the module, not the module itself: keys, evaluation and sampling stay those of the plain model
        self.next_token_loss: Callable[[Tensor], Tensor] = (
            torch.compile(self._next_token_loss, dynamic=False) if compiled else self._next_token_loss
        )
        bf16, T = self.trainer.precision == "bf16-mixed", self.model.config.block_size
        # computed again in the backward pass, attention would be outside this context
        if attends_by_matmuls(device_type, bf16, T) and not self.model.activation_checkpointing:
            self.next_token_loss = sdpa_kernel(SDPBackend.MATH)(self.next_token_loss)

    def configure_model(self) -> None:
        if self.device_mesh is not None and not isinstance(self.model, FSDPModule):  # trainer.strategy is fully_shard
            shard(self.model, self.device_mesh["data_parallel"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        differences = _differences(self.hparams["config"], checkpoint["hyper_parameters"]["config"])
        if differences:
            raise UserError(
                f"model.config differs from the checkpoint to resume from: {differences}; give the shape it was "
                "trained with, or another run_dir to start anew"
            )

    def fits(self, micro_batch_size: int) -> bool:
        """Whether training steps on micro-batches of this size fit the device's memory, by trying."""
        enough = True
        try:
            self._try_step(micro_batch_size)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            enough = False
        if not enough:
            torch.compiler.reset()  # a size that is never used must not count among those that may be compiled
        self.zero_grad()  # outside the handler, whose traceback holds the activations
        garbage_collection_cuda()
        return enough

    def _try_step(self, micro_batch_size: int) -> None:
        """The most memory that a step takes: a second micro-batch meets the gradients of the first, and AdamW's state.

        The optimizer has no state before its first step, so two copies of the parameters stand in for it.
        """
        state = [torch.empty_like(p) for p in self.parameters() for _ in range(2)]
        ids = torch.zeros(micro_batch_size, self.model.config.block_size + 1, dtype=torch.long, device=self.device)
        for _ in range(2):
            with self.trainer.precision_plugin.train_step_context():
                loss = self.next_token_loss(ids)
            loss.backward()
        del state

    def _next_token_loss(self, ids: Tensor) -> Tensor:
        """Mean cross-entropy of ids (B, T+1) int64, each predicted from those before it in its row."""
        hidden = self.model.hidden(ids[:, :-1])  # (B, T, C)
        return self.loss(hidden.flatten(0, 1), self.model.lm_head.weight, ids[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.next_token_loss(batch.long())
        first = batch_idx % self.trainer.accumulate_grad_batches == 0
        self.loss_sum = loss.detach() if first else self.loss_sum + loss.detach()
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        loss = self.next_token_loss(batch.long())
        self.val_loss.update(loss, weight=batch[:, 1:].numel())
        in_fit = self.trainer.state.fn == TrainerFn.FITTING  # there ValidationLoss logs it, at the step it belongs to
        self.log("val/loss", self.val_loss, on_step=False, on_epoch=True, logger=not in_fit)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by the global norm of all gradients, and keeps the norm they had before. 0 or null only measures it.

        Where that norm or the step's loss is not finite the gradients are dropped: an optimizer leaves parameters
        without a gradient, and its own state of them, as they are. All ranks see the same two numbers.
        """
        mean = self.loss_sum / self.trainer.accumulate_grad_batches
        self.step_loss = self.trainer.strategy.reduce(mean, reduce_op="mean")
        norm: Any = torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val or float("inf"))
        self.grad_norm = norm.full_tensor() if isinstance(self.model, FSDPModule) else norm
        self.step_applied = bool(torch.isfinite(self.step_loss + self.grad_norm))
        if not self.step_applied:
            optimizer.zero_grad()

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        try:
            optimizer = self.optimizer(decay_groups(self.named_parameters()))
        except (TypeError, ValueError) as error:
            raise UserError(
                f"model.optimizer cannot be set up ({error}): correct its arguments, or choose a class that accepts "
                "parameter groups, each with its own weight_decay, such as torch.optim.AdamW"
            ) from error
        optimizer.register_load_state_dict_pre_hook(_keep_typed_options)
        try:
            scheduler: Any = self.lr_scheduler(optimizer)
        except TypeError as error:
            raise UserError(f"model.lr_scheduler cannot be set up ({error}): choose a class that can") from error
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise UserError("model.lr_scheduler waits for a metric, not for a step: choose one that counts steps")
        # a schedule may have a rate of its own in mind, as OneCycleLR does
        self.typed_lrs = list(getattr(scheduler, "base_lrs", [group["lr"] for group in optimizer.param_groups]))
        if getattr(scheduler, "max_steps", 0) is None:
            scheduler.max_steps = self.trainer.max_steps
            if getattr(scheduler, "warmup_steps", 0) >= scheduler.max_steps:  # no mistake in a trial of a few steps
                self.print(
                    f"the warm-up of {scheduler.warmup_steps} steps is not over when this run of "
                    f"{scheduler.max_steps} ends"
                )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        """Obeys the learning rate of today's command where a scheduler of torch's own restored that of the first."""
        scheduler: Any = self.lr_schedulers()
        bases = getattr(scheduler, "base_lrs", self.typed_lrs)
        if bases != self.typed_lrs:
            for group, base, typed in zip(scheduler.optimizer.param_groups, bases, self.typed_lrs, strict=True):
                group["lr"] *= typed / base
            scheduler.base_lrs = list(self.typed_lrs)


def _keep_typed_options(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A resumed run obeys the options of today's command; the checkpoint only says where the lr had got to."""
    groups = [
        saved | {name: value for name, value in group.items() if name not in ("params", "lr", "initial_lr")}
        for saved, group in zip(state_dict["param_groups"], optimizer.param_groups, strict=True)
    ]
    return {"state": state_dict["state"], "param_groups": groups}


def _differences(ours: dict[str, int], theirs: dict[str, int]) -> str:
    """``n_embd=32 (theirs: 16)``, or nothing for equal shapes."""
    return ", ".join(f"{name}={ours[name]} (theirs: {theirs[name]})" for name in ours if ours[name] != theirs[name])
