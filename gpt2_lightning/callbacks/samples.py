"""Text sampled from the model as it learns, to the terminal and to TensorBoard."""

from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from gpt2_lightning.callbacks.steps import StepCallback
from gpt2_lightning.errors import UserError
from gpt2_lightning.generate import generate
from gpt2_lightning.module import GPTModule
from gpt2_lightning.tokenizer import END_OF_TEXT, VOCAB_SIZE, get_tokenizer


class Samples(StepCallback):
    """Samples text after a prompt, with the same random numbers each time, so that only the model changes.

    Args:
        every_n_steps: optimizer steps between two sets of samples; 0 = off.
        prompt: text that each sample begins with.
        num_samples: samples in a set.
        max_new_tokens: tokens generated for each sample.
        temperature: divides the logits; below 1 favours likely tokens.
        top_k: sample among the k most likely tokens.
        seed: of the random numbers.
    """

    label = "samples"

    def __init__(
        self,
        every_n_steps: NonNegativeInt = 250,
        prompt: str = "Hello, I'm a language model,",
        num_samples: PositiveInt = 4,
        max_new_tokens: PositiveInt = 32,
        temperature: PositiveFloat = 1.0,
        top_k: PositiveInt = 50,
        seed: NonNegativeInt = 42,
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
        if self.every_n_steps == 0 or stage != "fit":
            return
        config = pl_module.model.config
        if config.vocab_size < VOCAB_SIZE:
            pl_module.print(f"samples are off: vocab_size={config.vocab_size} is below GPT-2's {VOCAB_SIZE}")
            self.every_n_steps = 0
            return
        self.prompt_tokens = get_tokenizer().encode(self.prompt, allowed_special="all")
        if not 1 <= len(self.prompt_tokens) <= config.block_size:  # a resumed run would only find out N steps later
            raise UserError(
                f"samples.prompt has {len(self.prompt_tokens)} tokens and block_size is {config.block_size}: give 1 to "
                f"{config.block_size}"
            )

    def run(self, trainer: Trainer, module: GPTModule, step: int) -> None:
        if not trainer.is_global_zero:
            return
        with trainer.precision_plugin.val_step_context():
            samples = generate(
                module.model,
                [self.prompt_tokens] * self.num_samples,
                self.max_new_tokens,
                temperature=self.temperature,
                top_k=self.top_k,
                seed=self.seed,
            )
        texts = [get_tokenizer().decode([t for t in sample if t != END_OF_TEXT]) for sample in samples]
        for i, text in enumerate(texts):
            module.print(f"step {step:5d} | sample {i}: {text}")
        # indented by four spaces TensorBoard shows a text verbatim, not as Markdown
        verbatim = ["\n".join(f"    {line}" for line in text.splitlines()) for text in texts]
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("samples", "\n\n---\n\n".join(verbatim), step)
