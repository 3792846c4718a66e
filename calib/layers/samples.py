"""Choose the windows of text that calibration samples. Knows no method."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from graphs.errors import UsageError
from graphs.spec import ModelSpec

TOTAL_TOKENS = 16384  # 32 windows of 512
LENGTH = 512  # tokens of a window
EXTRA_SHARE = 4  # samples exceed a model's sliding window by a quarter of the window


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Windows of token ids, int64 [n, S], and their source, as plain data."""

    ids: Tensor
    data: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 of the ids and their shape."""
        ids = self.ids.contiguous()
        return hashlib.sha256(repr(tuple(ids.shape)).encode() + ids.numpy().tobytes()).hexdigest()

    def coverage(self, spec: ModelSpec) -> list[dict[str, Any]]:
        """Count, for each distinct attention window, the sample tokens beyond it."""
        count, length = self.ids.shape
        return [
            {"window": size, "tokens": count * length,
             "beyond": 0 if size is None else count * max(0, length - size)}
            for size in spec.windows
        ]  # fmt: skip


def default_length(spec: ModelSpec) -> int:
    """Return the tokens of a sample: `LENGTH`, or a quarter more than the widest sliding window."""
    widest = max((size for size in spec.windows if size is not None), default=0)
    return min(max(LENGTH, widest + widest // EXTRA_SHARE), spec.max_position_embeddings)


def check_length(length: int, spec: ModelSpec) -> None:
    """Raise UsageError unless samples of this length reach beyond every sliding window."""
    widest = max((size for size in spec.windows if size is not None), default=0)
    if length <= widest < spec.max_position_embeddings:
        raise UsageError(
            f"--length is {length:,}, but this model's window is {widest:,} tokens, and samples "
            f"have to reach beyond it. Give at least {widest + 1:,}."
        )
    if length > spec.max_position_embeddings:
        raise UsageError(
            f"--length is {length:,}, but the checkpoint was made for "
            f"{spec.max_position_embeddings:,} positions. Give at most that."
        )


def evenly_spaced(windows: Tensor, count: int) -> Tensor:
    """Return `count` of the windows [n, S], evenly spaced over the text, or all if fewer."""
    total = len(windows)
    if count >= total:
        return windows
    return windows[torch.arange(count) * total // count]
