"""The training step around the network: loss, compilation, optimizer set-up and the metrics of a step.

When to evaluate, sample and save is decided in ``callbacks/``.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt2_lightning.checkpoints.load import load
from gpt2_lightning.data.datamodule import TokenDataModule
from gpt2_lightning.errors import UserError
from gpt2_lightning.evals.validation import MeanLoss
from gpt2_lightning.hardware import keep_compiled_code, keep_freed_memory, math_attention_is_faster
from gpt2_lightning.loss import LinearCrossEntropy, tokens_per_chunk
from gpt2_lightning.model import GPT, GPTConfig
from gpt2_lightning.optim import AdamW, decay_groups
from gpt2_lightning.schedule import WarmupCosine
from gpt2_lightning.sharding import shard
from gpt2_lightning.tokenizer import VOCAB_SIZE


class GPTModule(LightningModule):
    """GPT-2 in training. A batch is (micro_batch_size, block_size + 1) token ids of any integer type.

    Args:
        config: shape of the model; null takes that of ``init_from``, or GPT-2 (124M) without it.
        init_from: weights to start from: gpt2, gpt2-medium, gpt2-large, gpt2-xl, a checkpoint or an exported folder.
            If ``config`` is given as well, the two must agree.
        optimizer: class and its arguments. Biases and LayerNorms are never decayed, whatever its ``weight_decay``.
        lr_scheduler: class and its arguments, stepped once per optimizer step. If it has a ``max_steps`` of null,
            ``trainer.max_steps`` is used.
        compile: whether to torch.compile the training step; auto does so on CUDA.
        chunked_loss: whether to compute the loss in chunks, without ever holding all logits. auto does so on a CPU,
            where it is faster; on a GPU it saves memory.
        activation_checkpointing: compute each block's activations again in the backward pass instead of keeping them:
            the same losses, a quarter to a third slower, for models that do not fit otherwise.
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
        if isinstance(config, dict):  # from `load_from_checkpoint`
            config = GPTConfig(**config)
        self.model = GPT(config or GPTConfig()) if init_from is None else load(init_from).train()
        sizes = None if config is None else (config.vocab_size, self.model.config.vocab_size)
        if config is not None and sizes == (GPTConfig.vocab_size, VOCAB_SIZE):
            config = replace(config, vocab_size=VOCAB_SIZE)  # 50304 is only GPTConfig's default, 50257 the weights' own
        if config is not None and config != self.model.config:
            raise UserError(
                f"model.config differs from the weights of {init_from}: "
                f"{_differences(asdict(config), asdict(self.model.config))}; set model.config to null to take theirs"
            )
        self.model.activation_checkpointing = activation_checkpointing
        self.save_hyperparameters({"config": asdict(self.model.config)})
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.compile_mode = compile
        self.chunked_loss = chunked_loss
        self.val_loss = MeanLoss()
        self.loss_sum = torch.zeros(())  # over the micro-batches of the current step, on this rank
        self.step_loss = torch.zeros(())  # of the last step: mean over its micro-batches and all ranks
        self.grad_norm = torch.zeros(())  # of the last step, before clipping
        self.step_applied = True  # False if loss or norm of the last step was not finite

    def setup(self, stage: str) -> None:
        if self.trainer.gradient_clip_algorithm == "value":
            raise UserError("trainer.gradient_clip_algorithm: only clipping by the global norm is supported")
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if stage == "fit" and isinstance(data, TokenDataModule):
            set_accumulation(self.trainer, data)
        device_type = self.trainer.strategy.root_device.type
        if device_type == "cpu":
            keep_freed_memory()
        chunked = device_type == "cpu" if self.chunked_loss == "auto" else self.chunked_loss
        self.loss = LinearCrossEntropy(tokens_per_chunk(self.model.config.vocab_size) if chunked else None)
        compiled = self.compile_mode
        if compiled == "auto":
            compiled = device_type == "cuda" and sys.platform != "win32"
        if compiled:
            keep_compiled_code()
            # one compilation for each micro-batch size of a batch-size schedule, and for those of validation
            torch._dynamo.config.recompile_limit = 64
        # A compiled function beside the model, not a compiled model: checkpoint keys, evaluation and sampling stay
        # those of the plain model.
        self.next_token_loss: Callable[[Tensor], Tensor] = (
            torch.compile(self._next_token_loss, dynamic=False) if compiled else self._next_token_loss
        )
        bf16, T = self.trainer.precision == "bf16-mixed", self.model.config.block_size
        # not with activation checkpointing: the backward pass runs attention again outside this context
        if math_attention_is_faster(device_type, bf16, T) and not self.model.activation_checkpointing:
            self.next_token_loss = sdpa_kernel(SDPBackend.MATH)(self.next_token_loss)

    def configure_model(self) -> None:
        if self.device_mesh is not None and not isinstance(self.model, FSDPModule):  # trainer.strategy is fully_shard
            shard(self.model, self.device_mesh["data_parallel"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        differences = _differences(self.hparams["config"], checkpoint["hyper_parameters"]["config"])
        if differences:
            raise UserError(
                f"model.config differs from that of the checkpoint to resume from: {differences}; use the shape it was "
                "trained with, or another run_dir for a new run"
            )

    def _next_token_loss(self, ids: Tensor) -> Tensor:
        """Mean cross-entropy of predicting each of ids (B, T+1) int64 from those before it, in nats per token."""
        hidden = self.model.hidden(ids[:, :-1])  # (B, T, C)
        return self.loss(hidden.flatten(0, 1), self.model.lm_head.weight, ids[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.next_token_loss(batch.long())
        first = batch_idx % self.trainer.accumulate_grad_batches == 0
        self.loss_sum = loss.detach() if first else self.loss_sum + loss.detach()
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.val_loss.update(self.next_token_loss(batch.long()), weight=batch[:, 1:].numel())
        self.log("val/loss", self.val_loss)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the global norm of all gradients (0 or None only measures it) and log the step.

        If the loss or the norm is not finite, the gradients are dropped, so that the optimizer changes neither
        parameters nor its state. All ranks see the same two numbers and decide alike.
        """
        mean = self.loss_sum / self.trainer.accumulate_grad_batches
        self.step_loss = self.trainer.strategy.reduce(mean, reduce_op="mean")
        norm: Any = torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val or float("inf"))
        self.grad_norm = norm.full_tensor() if isinstance(self.model, FSDPModule) else norm
        self.step_applied = bool(torch.isfinite(self.step_loss + self.grad_norm))
        if not self.step_applied:
            optimizer.zero_grad()
        if self.is_logged(self.global_step):
            self._log_step(optimizer.param_groups[0]["lr"])

    def is_logged(self, step: int) -> bool:
        """Whether ``train/*`` of this step (counted from 0) is logged: each N-th from 0 on, and the last."""
        every_n_steps: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return (every_n_steps > 0 and step % every_n_steps == 0) or step + 1 == self.trainer.max_steps

    def _log_step(self, lr: float) -> None:
        """Log the metrics of the step that is being made, at its number (from 0), as build-nanogpt does.

        Not by ``self.log``: Lightning writes that after the step's callbacks, so a run killed in between would have a
        checkpoint of a step whose loss is missing.
        """
        step = self.global_step
        values = {"train/loss": self.step_loss.item(), "train/grad_norm": float(self.grad_norm), "train/lr": float(lr)}
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, TokenDataModule):
            values["train/tokens"] = float(data.tokens_before(step + 1))
        record(self.trainer, values, step)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        try:
            optimizer = self.optimizer(decay_groups(self.named_parameters()))
        except (TypeError, ValueError) as error:
            raise UserError(
                f"model.optimizer cannot be set up ({error}): correct its arguments, or choose a class that accepts "
                "parameter groups, each with its own weight_decay, such as torch.optim.AdamW"
            ) from error
        optimizer.register_load_state_dict_pre_hook(_keep_current_options)
        try:
            scheduler: Any = self.lr_scheduler(optimizer)
        except TypeError as error:
            raise UserError(f"model.lr_scheduler cannot be set up ({error}): correct its arguments") from error
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise UserError("model.lr_scheduler waits for a metric: choose one that counts steps")
        # of the scheduler, where it sets rates of its own, as OneCycleLR does
        self.base_lrs = list(getattr(scheduler, "base_lrs", [group["lr"] for group in optimizer.param_groups]))
        if getattr(scheduler, "max_steps", 0) is None:
            scheduler.max_steps = self.trainer.max_steps
            warmup = getattr(scheduler, "warmup_steps", 0)
            if warmup >= scheduler.max_steps:  # not an error: a short trial of a long recipe
                self.print(f"the warm-up of {warmup} steps is not over when this run of {scheduler.max_steps} ends")
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        """Apply this command's learning rate where torch's own schedulers have restored the checkpoint's."""
        scheduler: Any = self.lr_schedulers()
        restored = getattr(scheduler, "base_lrs", self.base_lrs)
        if restored != self.base_lrs:
            for group, before, now in zip(scheduler.optimizer.param_groups, restored, self.base_lrs, strict=True):
                group["lr"] *= now / before
            scheduler.base_lrs = list(self.base_lrs)


def record(trainer: Trainer, values: dict[str, float], step: int) -> None:
    """Write ``values`` at ``step`` to all loggers, and to where callbacks that monitor a metric look for it."""
    for logger in trainer.loggers:
        logger.log_metrics(values, step)
    trainer.callback_metrics.update(values)  # type: ignore[arg-type]


def set_accumulation(trainer: Trainer, data: TokenDataModule) -> None:
    """Let the Trainer accumulate as many micro-batches as make up a step.

    Raises:
        UserError: the Trainer's own setting differs; or ``overfit_batches``, ``limit_train_batches`` or
            ``fast_dev_run`` would end the epoch inside a step, which Lightning would make with fewer micro-batches.
    """
    given, accumulate = trainer.accumulate_grad_batches, data.accumulate_grad_batches
    if given not in (1, accumulate):
        raise UserError(
            f"trainer.accumulate_grad_batches={given} disagrees with data.total_batch_tokens="
            f"{data.total_batch_tokens}, which takes {accumulate} micro-batches per device: leave it out, it is derived"
        )
    limit: float = trainer.limit_train_batches  # type: ignore[attr-defined] # 1.0 is all of them, 1 a single one
    overfit: float = trainer.overfit_batches  # type: ignore[attr-defined]
    if not overfit and (limit != 1.0 or isinstance(limit, int)):  # Lightning copies overfit_batches to the other
        raise UserError(
            "trainer.limit_train_batches and fast_dev_run count micro-batches and could cut a step: set "
            "trainer.max_steps instead"
        )
    if overfit % accumulate != 0:
        raise UserError(
            f"trainer.overfit_batches={overfit} is not a multiple of the {accumulate} micro-batches of a step"
        )
    trainer.accumulate_grad_batches = accumulate


def _keep_current_options(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Resume with this command's weight decay, betas …; of the checkpoint's options only the learning rate counts."""
    groups = [
        saved | {name: value for name, value in group.items() if name not in ("params", "lr", "initial_lr")}
        for saved, group in zip(state_dict["param_groups"], optimizer.param_groups, strict=True)
    ]
    return {"state": state_dict["state"], "param_groups": groups}


def _differences(ours: dict[str, int], theirs: dict[str, int]) -> str:
    """``n_embd=32 (theirs: 16)``, or an empty string for equal shapes."""
    return ", ".join(f"{name}={ours[name]} (theirs: {theirs[name]})" for name in ours if ours[name] != theirs[name])
