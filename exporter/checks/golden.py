"""Which tokens the reference prefers in a few short texts. Knows nothing about bundles.

One pass over a text gives the preference after each of its positions, so a 7B is read once. Only
clear preferences are recorded: those whose lead over the runner-up is larger than what arithmetic
of the bundle's precision can make of equal numbers.
"""

from collections.abc import Callable
from typing import Any

import torch

from exporter.decoder.model import Decoder, logits_at
from graphs.dtypes import Dtype

TEXTS = (
    "The capital of France is Paris. The capital of Italy is",
    "def add(a, b):\n    return a + b\n\ndef subtract(a, b):\n    return",
)
LONGEST = 12  # tokens of a text: half as many one-token steps when a bundle is loaded

MARGIN: dict[Dtype, float] = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
"""The lead that counts as clear, as a share of the largest logit, by activation.

Ten times the differences seen: 1e-5 to 1e-4 of the largest logit in float32, and the significands
of float16 and bfloat16 are coarser by 2^13 and 2^16, of which a model's depth averages most out.
"""


ROUNDED_MARGIN = 0.1
"""The same where inputs are rounded to 8 bits while computing: one number that falls to the other
side is a step of 1/127 of its block, and the layers after it carry it on."""


def margin(activation: Dtype, *, rounded: bool) -> float:
    """Return the lead that counts as clear; `rounded` says whether inputs are."""
    return max(MARGIN[activation], ROUNDED_MARGIN) if rounded else MARGIN[activation]


def golden(
    reference: Decoder, encode: Callable[[str], list[int]], lead: float
) -> list[dict[str, Any]]:
    """Return the texts as ids, each with the preferences clear by `lead` as [position, token]."""
    size = reference.spec.vocab_size
    texts = [[i for i in encode(text) if i < size][:LONGEST] for text in TEXTS]
    texts = [ids for ids in texts if ids]
    if not texts:
        return []
    # One pass for all: what stands right of a text's end does not change what comes before it.
    padded = torch.zeros(len(texts), LONGEST, dtype=torch.int64)
    for row, ids in zip(padded, texts, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    logits = logits_at(reference, padded, torch.arange(LONGEST))  # [texts, n, V]
    return [
        {"ids": ids, "expected": _clear(row[: len(ids)], lead)}
        for ids, row in zip(texts, logits, strict=True)
    ]


def _clear(logits: torch.Tensor, lead: float) -> list[list[int]]:
    """Position and token of every clear preference in logits [n, V]."""
    best, runner_up = logits.topk(2, dim=-1).values.unbind(-1)
    clear = best - runner_up >= lead * logits.abs().max()
    tokens = logits.argmax(-1).tolist()
    return [[i, token] for i, token in enumerate(tokens) if clear[i]]
