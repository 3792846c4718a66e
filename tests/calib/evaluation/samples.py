"""Builds, log-probabilities and a question for the tests of this folder. Asserts nothing."""

from typing import Any

import numpy as np

from graphs.build import Build, Storage
from graphs.contract import GraphContract
from graphs.precisions import PRECISIONS
from graphs.spec import ModelSpec, RingSpec
from graphs.targets import TARGETS
from runtime.backends.session import Logits
from tests.support.make_checkpoint import tiny_spec

SLIDING, PLAIN = tiny_spec(window=8), tiny_spec()
GOOD_QUESTION: dict[str, Any] = {"question": "2 + 2 =", "choices": ["4", "5"], "answer": 0}


def build_of(spec: ModelSpec, context: int = 64) -> Build:
    return Build(
        target=TARGETS["cpu"], precision=PRECISIONS["fp32"],
        contract=GraphContract(spec=spec, ring=RingSpec(chunk=3, context=context),
                               activation="float32"),
        storage=Storage(),
    )  # fmt: skip


def log_softmax(logits: Logits) -> np.ndarray:
    wide = logits.astype(np.float64)
    return wide - np.logaddexp.reduce(wide, axis=-1, keepdims=True)
