"""Manifests, log-probabilities and a question for the tests of this folder. Asserts nothing."""

from typing import Any

import numpy as np

from graphs.manifest import Manifest
from graphs.spec import ModelSpec, RingSpec
from runtime.backends.session import Logits
from tests.support.make_checkpoint import tiny_spec

SLIDING, PLAIN = tiny_spec(window=8), tiny_spec()
GOOD_QUESTION: dict[str, Any] = {"question": "2 + 2 =", "choices": ["4", "5"], "answer": 0}


def manifest_of(spec: ModelSpec, context: int = 64) -> Manifest:
    return Manifest(
        target="cpu", precision="fp32", activation="float32", model=spec,
        ring=RingSpec(chunk=3, context=context), window_source="checkpoint", checkpoint={},
        versions={}, files={},
    )  # fmt: skip


def log_softmax(logits: Logits) -> np.ndarray:
    wide = logits.astype(np.float64)
    return wide - np.logaddexp.reduce(wide, axis=-1, keepdims=True)
