"""Published figures to hold a run against, each with its source."""

VAL_LOSS = {"GPT-2 124M": 3.2924}
"""OpenAI's weights on the validation shard of FineWeb-EDU, nats per token (build-nanogpt); of no other data."""
VAL_LOSS_SOURCE = "fineweb-edu"
"""The ``data.source`` whose validation split that is."""

HELLASWAG = {
    "hellaswag": {"GPT-2 124M": 0.2955, "GPT-3 124M": 0.337, "GPT-2 XL": 0.4893},
    "hellaswag_harness": {"GPT-2 124M": 0.3114, "GPT-2 XL": 0.5089},
}
"""acc_norm by the tag of its style, on all rows of the validation split: GPT-2 as build-nanogpt measured it in both
styles, GPT-3 as its paper has it (Brown et al. 2020, table H.1)."""
HELLASWAG_EXAMPLES = 10042
"""Rows of that split: a score of another number of rows is one of other questions."""
CHANCE = 0.25
"""acc_norm of guessing one ending of four."""
