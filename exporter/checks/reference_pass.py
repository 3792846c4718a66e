"""Ask the reference everything that an export compares with, in one pass over the weights.

A weight that is mapped from a checkpoint larger than the page cache is read from the disk on every
pass, and a fake-quantized one is rounded anew. So all texts go through a layer before the next
layer is touched.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exporter.checks import golden
from exporter.checks.texts import Case
from exporter.decoder.model import Decoder, empty_caches
from exporter.decoder.operators import gather_rows
from graphs.build import Build

Logits = NDArray[np.float32]

COMPARED = 256  # positions whose logits are compared, evenly spread: 256 x 32,000 are 33 MB


class Text(NamedTuple):
    """Token ids [B, n], and the positions [T] whose logits are wanted."""

    ids: Tensor
    rows: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What the reference says: golden tokens, and logits [T, V] for each case of a verification."""

    golden: list[dict[str, Any]]
    logits: list[Logits]


def ask(
    reference: Decoder, build: Build, cases: Sequence[Case], encode: Callable[[str], list[int]]
) -> Answers:
    """Ask for the golden tokens and the logits of `cases` together."""
    known = golden.encoded(encode, build.spec.vocab_size)
    texts = [Text(*golden.padded(known))] if known else []
    found = logits_in_one_pass(reference, [*texts, *case_texts(build, cases)])
    clear = []
    if known:
        lead = golden.margin(build.activation, rounded=build.rounds_inputs)
        clear = golden.golden(known, found.pop(0), lead)
    return Answers(golden=clear, logits=[logits[0].numpy() for logits in found])


def case_texts(build: Build, cases: Sequence[Case]) -> list[Text]:
    """Return the texts of `cases`, the same pseudo-random tokens every time, as [1, n]."""
    generator = np.random.Generator(np.random.PCG64(0))
    texts = []
    for case in cases:
        ids = generator.integers(0, build.spec.vocab_size, case.tokens)
        wanted = np.unique(np.linspace(0, case.tokens - 1, COMPARED).astype(np.int64))
        texts.append(Text(torch.from_numpy(ids)[None], torch.from_numpy(wanted)))
    return texts


def logits_in_one_pass(decoder: Decoder, texts: Sequence[Text]) -> list[Tensor]:
    """Return the logits [B, T, V] of each text, bit-identical to `logits_at` on that text alone."""
    with torch.inference_mode():
        past = [empty_caches(decoder.spec, *ids.shape) for ids, _ in texts]
        x = [decoder.embed(ids) for ids, _ in texts]  # [B, n, E] each
        steps = [
            decoder.prepare(torch.arange(ids.shape[1]).expand(ids.shape), caches, one.dtype)
            for (ids, _), caches, one in zip(texts, past, x, strict=True)
        ]
        for i, layer in enumerate(decoder.model.layers):
            x = [
                layer(one, step, caches[2 * i : 2 * i + 2])[0]
                for one, step, caches in zip(x, steps, past, strict=True)
            ]
        wanted = [
            gather_rows(one, rows.expand(len(one), -1))  # [B, T, E]
            for one, (_, rows) in zip(x, texts, strict=True)
        ]
        return [decoder.logits(rows) for rows in wanted]
