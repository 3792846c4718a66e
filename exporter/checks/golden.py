"""Golden tokens: what the reference prefers in a few short texts. Knows nothing about bundles.

One pass gives the preference after every position of all texts. Only clear preferences are
recorded: those whose lead over the runner-up is larger than the rounding of the bundle's precision.
"""

from collections.abc import Callable
from typing import Any

import torch

from graphs.dtypes import Dtype

TEXTS = (
    "The capital of France is Paris. The capital of Italy is",
    "def add(a, b):\n    return a + b\n\ndef subtract(a, b):\n    return",
)
LONGEST = 12  # tokens of a text: half as many one-token steps when a bundle is loaded

MARGIN: dict[Dtype, float] = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
"""The lead that counts as clear, as a share of the largest logit, by activation.

Ten times the differences seen: 1e-5 to 1e-4 of the largest logit in float32. The significands of
float16 and bfloat16 are coarser by 2^13 and 2^16, and a model's depth averages most of that out.
"""


ROUNDED_MARGIN = 0.1
"""The same where inputs are rounded to 8 bits while computing: a number that rounds the other way
moves by 1/127 of its block's largest, and the layers after it pass that on."""


def margin(activation: Dtype, *, rounded: bool) -> float:
    """Return the lead that counts as clear; `rounded` says whether inputs are."""
    return max(MARGIN[activation], ROUNDED_MARGIN) if rounded else MARGIN[activation]


def encoded(encode: Callable[[str], list[int]], vocab_size: int) -> list[list[int]]:
    """Return the texts as ids of the model, those that have any."""
    texts = [[i for i in encode(text) if i < vocab_size][:LONGEST] for text in TEXTS]
    return [ids for ids in texts if ids]


def padded(texts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the texts as one batch [B, n], and all its positions [n].

    What stands right of a text's end does not change what comes before it.
    """
    batch = torch.zeros(len(texts), LONGEST, dtype=torch.int64)
    for row, ids in zip(batch, texts, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return batch, torch.arange(LONGEST)


def golden(texts: list[list[int]], logits: torch.Tensor, lead: float) -> list[dict[str, Any]]:
    """Return each text with the preferences clear by `lead` as [position, token].

    `logits` [B, n, V] are those of `padded`.
    """
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
