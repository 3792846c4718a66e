"""Which tokens the reference prefers in a few short texts. Knows nothing about bundles.

One pass over a text gives the preference after each of its positions, so a 7B is read once. Only
clear preferences are recorded: those whose lead over the runner-up is larger than what arithmetic
of the bundle's precision can make of equal numbers.
"""

from collections.abc import Callable
from typing import Any

import torch

from exporter.model import Decoder, logits_at
from graphs.spec import Dtype

TEXTS = (
    "The capital of France is Paris. The capital of Italy is",
    "def add(a, b):\n    return a + b\n\ndef subtract(a, b):\n    return",
)
LONGEST = 12  # tokens of a text: half as many one-token steps when a bundle is loaded

MARGIN: dict[Dtype, float] = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
"""The lead that counts as clear, as a share of the largest logit.

Ten times the differences seen: 1e-5 to 1e-4 of the largest logit in float32, and the significands
of float16 and bfloat16 are coarser by 2^13 and 2^16, of which a model's depth averages most out.
"""


def golden(
    reference: Decoder, encode: Callable[[str], list[int]], activation: Dtype
) -> list[dict[str, Any]]:
    """Return the texts as ids, each with the clear preferences as [position, token]."""
    found = []
    for text in TEXTS:
        ids = torch.tensor([i for i in encode(text) if i < reference.spec.vocab_size][:LONGEST])
        if not len(ids):
            continue
        logits = logits_at(reference, ids, torch.arange(len(ids)))  # [n, V]
        best, runner_up = logits.topk(2, dim=-1).values.unbind(-1)
        clear = best - runner_up >= MARGIN[activation] * logits.abs().max()
        tokens = logits.argmax(-1).tolist()
        expected = [[i, tokens[i]] for i in range(len(ids)) if clear[i]]
        found.append({"ids": ids.tolist(), "expected": expected})
    return found
