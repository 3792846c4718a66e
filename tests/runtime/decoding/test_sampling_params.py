"""Sampling parameters: invalid values are refused, valid ones are copied."""

import math
from typing import Any

import numpy as np
import pytest

from graphs.errors import UsageError
from runtime.decoding.sampling import Sampler, SamplingParams


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; a number from 0 to 1000"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"temperature": True}, "temperature is True"),
        ({"top_p": 1.5}, "top_p is 1.5; a number from 0 to 1 is expected"),
        ({"min_p": -1}, "min_p is -1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"presence_penalty": math.inf}, "presence_penalty is inf"),
        ({"frequency_penalty": None}, "frequency_penalty is None"),
        ({"top_k": -1}, "top_k is -1; a whole number from 0 up is expected .0 is off"),
        ({"top_k": 2.5}, "top_k is 2.5"),
        ({"top_k": None}, "top_k is None"),
        ({"seed": -1}, "seed is -1"),
        ({"logprobs": False}, "logprobs is False"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias maps -1 to 1.0"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias maps '5' to 1.0"),
        ({"logit_bias": {5: math.nan}}, "logit_bias maps 5 to nan"),
        ({"logit_bias": {5: math.inf}}, "logit_bias maps 5 to inf"),
    ],
    ids=str,
)
def test_invalid_params_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SamplingParams(**options)


def test_numpy_numbers_are_accepted() -> None:
    params = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(4), seed=np.int64(1))
    sampled = Sampler(params, 8).sample(np.zeros(8, dtype=np.float32))
    assert type(sampled.token_id) is int


def test_changing_the_given_mapping_does_not_change_params() -> None:
    bias = {1: 2.0}
    params = SamplingParams(logit_bias=bias)
    bias[1] = -5.0
    assert params.logit_bias == {1: 2.0}
    assert hash(params) == hash(SamplingParams(logit_bias={1: 2.0}))
