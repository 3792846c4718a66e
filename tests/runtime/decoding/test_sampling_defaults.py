"""Sampling parameters: the checkpoint sets defaults, the user overrides them."""

from runtime.cli import options
from runtime.decoding.sampling_defaults import sampling_params


def test_user_options_override_the_checkpoints_sampling_defaults() -> None:
    defaults = {"temperature": 0.7, "top_k": 40, "eos_token_id": [2]}
    given = options.SamplingOptions(top_k=5).given
    params = sampling_params(defaults, given)
    assert (params.temperature, params.top_k, params.seed) == (0.7, 5, None)
    greedy = sampling_params({**defaults, "do_sample": False}, {})
    assert greedy.temperature == 0
    assert sampling_params({}, {}).temperature == 0
