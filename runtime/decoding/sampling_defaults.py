"""Combine a checkpoint's sampling defaults with a request's values. Knows no command."""

import math
from typing import Any

from runtime.decoding.sampling import SamplingParams

DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""Fields of `generation_config.json` that are used; sampling is greedy if it sets none.

Beside them `do_sample`, whose temperature is 1 if the file names none, and `suppress_tokens`, which
no request can choose.
"""


def sampling_params(defaults: dict[str, Any], given: dict[str, Any]) -> SamplingParams:
    """Sampling parameters; `given` overrides `defaults`. Greedy if neither asks for sampling."""
    values: dict[str, Any] = {"temperature": 0.0}
    if defaults.get("do_sample"):
        values["temperature"] = 1.0
    values |= {name: defaults[name] for name in DEFAULTS if name in defaults}
    if defaults.get("do_sample") is False:
        values["temperature"] = 0.0
    values |= given
    never = dict.fromkeys(defaults.get("suppress_tokens", ()), -math.inf)
    if never:
        values["logit_bias"] = {**values.get("logit_bias", {}), **never}
    return SamplingParams(**values)
