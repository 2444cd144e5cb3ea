"""Text sampled from the model as it learns, to the terminal and to TensorBoard."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from gpt2_lightning.callbacks.steps import EveryNSteps
from gpt2_lightning.errors import UserError
from gpt2_lightning.generate import check_settings, generate
from gpt2_lightning.module import GPTModule
from gpt2_lightning.tokenizer import END_OF_TEXT, VOCAB_SIZE, get_tokenizer


class Samples(EveryNSteps):
    """Continues a prompt, always with the same random numbers, so that what changes is the model.

    Args:
        every_n_steps: optimizer steps between two sets of samples; 0 = off.
        prompt: text to continue.
        num_samples: continuations each time.
        max_new_tokens: length of a continuation.
        temperature: of the softmax; below 1 is bolder.
        top_k: sample among this many of the likeliest tokens.
        seed: of the samples.
    """

    section = "samples"
    label = "samples"

    def __init__(
        self,
        every_n_steps: int = 250,
        prompt: str = "Hello, I'm a language model,",
        num_samples: int = 4,
        max_new_tokens: int = 32,
        temperature: float = 1.0,
        top_k: int = 50,
        seed: int = 42,
    ) -> None:
        super().__init__(every_n_steps)
        self.prompt = prompt
        self.num_samples = num_samples
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_k = top_k
        self.seed = seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, GPTModule)
        config = pl_module.model.config
        if self.every_n_steps == 0 or stage != "fit":
            return
        if config.vocab_size < VOCAB_SIZE:
            pl_module.print(
                f"samples are off: they need GPT-2's BPE, and model.config.vocab_size={config.vocab_size} is below "
                f"{VOCAB_SIZE}"
            )
            self.every_n_steps = 0
            return
        if not all(1 <= number < 2**31 for number in (self.num_samples, self.max_new_tokens)):
            raise UserError(
                f"samples.num_samples={self.num_samples} and max_new_tokens={self.max_new_tokens}: give at least 1 of "
                "each, or samples.every_n_steps=0 for none"
            )
        try:
            check_settings(self.max_new_tokens, self.temperature, self.top_k, top_p=1.0)
        except ValueError as error:
            raise UserError(f"samples.{error}") from None
        if not 0 <= self.seed < 2**62:
            raise UserError(f"samples.seed is {self.seed}: give a whole number from 0 to 2**62")
        n = len(get_tokenizer().encode(self.prompt, allowed_special="all"))
        if not 0 < n <= config.block_size:
            raise UserError(
                f"samples.prompt has {n} tokens and block_size is {config.block_size}: give 1 to {config.block_size}"
            )

    def run(self, trainer: Trainer, module: GPTModule, step: int) -> None:
        if not trainer.is_global_zero:
            return
        tokenizer = get_tokenizer()
        prompt = tokenizer.encode(self.prompt, allowed_special="all")
        with trainer.precision_plugin.val_step_context():
            rows = generate(
                module.model,
                [prompt] * self.num_samples,
                self.max_new_tokens,
                temperature=self.temperature,
                top_k=self.top_k,
                seed=self.seed,
            )
        texts = [tokenizer.decode([t for t in row if t != END_OF_TEXT]) for row in rows]
        for i, text in enumerate(texts):
            module.print(f"step {step:5d} | sample {i}: {text}")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                # indented by four: TensorBoard shows it as it is, not as Markdown
                shown = "\n\n---\n\n".join("\n".join("    " + line for line in text.splitlines()) for text in texts)
                logger.experiment.add_text("samples", shown, step)
