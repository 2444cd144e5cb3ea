"""HellaSwag examples per second: ours against the video's loop over single examples, alternating. Not a test.

    python tests/benchmarks/bench_hellaswag.py HELLASWAG.jsonl [examples]

A GPT-2 of the 124M shape with random weights, in fp32, on a GPU if there is one. The loop computes the context again
for each ending, and all logits.
"""

import sys
import time

import torch
from torch.nn import functional as F

from gpt2_lightning.evals.hellaswag import Example, ExampleSet, load_examples, score_examples
from gpt2_lightning.model import GPT, GPTConfig
from gpt2_lightning.tokenizer import get_tokenizer

PARTS = 4  # the two alternate, so that a noisy machine affects both


@torch.no_grad()
def one_by_one(model: GPT, examples: list[Example]) -> list[tuple[int, int]]:
    """The predictions by summed and by mean loss for each example, computed as in the video's script."""
    encode = get_tokenizer().encode_ordinary
    predictions = []
    for example in examples:
        context, endings = encode(example.ctx), [encode(" " + ending) for ending in example.endings]
        length = max(len(context) + len(ending) for ending in endings)
        tokens = torch.zeros(4, length, dtype=torch.long)
        mask = torch.zeros(4, length)
        for i, ending in enumerate(endings):
            tokens[i, : len(context) + len(ending)] = torch.tensor(context + ending)
            mask[i, len(context) : len(context) + len(ending)] = 1
        tokens, mask = tokens.to(model.lm_head.weight.device), mask.to(model.lm_head.weight.device)
        logits = model(tokens)[:, :-1]  # (4, T-1, V)
        losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(4, -1)
        sums = (losses * mask[:, 1:]).sum(1)
        predictions.append((int(sums.argmin()), int((sums / mask[:, 1:].sum(1)).argmin())))
    return predictions


def main(path: str, count: int = 200) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=50257)).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    examples = load_examples(path).examples
    chosen = list(examples[:: max(1, len(examples) // count)][:count])
    one_by_one(model, chosen[:2])
    score_examples(model, ExampleSet(tuple(chosen[:2]), ""))
    loop, ours, same = 0.0, 0.0, 0
    for part in range(PARTS):
        examples = chosen[part::PARTS]
        started = time.perf_counter()
        expected = one_by_one(model, examples)
        between = time.perf_counter()
        found = score_examples(model, ExampleSet(tuple(examples), ""))
        ended = time.perf_counter()
        loop, ours = loop + between - started, ours + ended - between
        same += sum(a == (b.prediction, b.prediction_norm) for a, b in zip(expected, found, strict=True))
    n = len(chosen)
    print(f"{n} examples: loop {n / loop:.2f}/s, ours {n / ours:.2f}/s, ratio {loop / ours:.2f}; same {same}/{n}")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
