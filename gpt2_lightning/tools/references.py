"""Published figures that the report draws beside a run, each with its source."""

VAL_LOSS = {"GPT-2 124M": 3.2924}
"""Loss of OpenAI's weights on the validation shard of FineWeb-EDU, nats per token (build-nanogpt)."""
VAL_LOSS_SOURCE = "fineweb-edu"
"""The `data.source` with that validation shard."""

HELLASWAG = {
    "hellaswag": {"GPT-2 124M": 0.2955, "GPT-3 124M": 0.337, "GPT-2 XL": 0.4893},
    "hellaswag_harness": {"GPT-2 124M": 0.3114, "GPT-2 XL": 0.5089},
}
"""acc_norm on the whole validation split, by the tag of the style. GPT-2: measured by build-nanogpt in both styles.
GPT-3: its paper (Brown et al. 2020, table H.1)."""
HELLASWAG_EXAMPLES = 10042
"""Examples in that split. A score on fewer examples is not directly comparable."""
CHANCE = 0.25
"""acc_norm of guessing one ending of four."""
