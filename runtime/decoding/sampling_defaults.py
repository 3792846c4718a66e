"""Combine a checkpoint's sampling defaults with a request's values. Knows no command."""

from typing import Any

from runtime.decoding.sampling import SamplingParams

DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""Fields of `generation_config.json` that are used; sampling is greedy if it sets none."""


def sampling_params(defaults: dict[str, Any], given: dict[str, Any]) -> SamplingParams:
    """Sampling parameters; `given` overrides `defaults`. Greedy if neither asks for sampling."""
    values: dict[str, Any] = {"temperature": 0.0}
    values |= {name: defaults[name] for name in DEFAULTS if name in defaults}
    if defaults.get("do_sample") is False:
        values["temperature"] = 0.0
    return SamplingParams(**values | given)
