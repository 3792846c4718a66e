"""Rotary frequencies of a model, with the checkpoint's scaling. Knows nothing about graphs.

All of it in float32 as in Hugging Face transformers (`modeling_rope_utils.py`): a difference of one
unit in the last place grows to a measurable angle at position 20,000. R is the number of rotated
features of a head.
"""

import math

import torch
from torch import Tensor

from graphs.rope import RopeScaling
from graphs.spec import ModelSpec


def inverse_frequencies(spec: ModelSpec) -> Tensor:
    """Return the rotation of each pair of features per position, in radians: [R/2], float32.

    theta^(-2i/R) (Su et al. 2021, arXiv:2104.09864), with the checkpoint's scaling.
    """
    features = spec.rotated_features
    powers = spec.rope_theta ** (torch.arange(0, features, 2).float() / features)  # [R/2]
    scaling = spec.rope_scaling
    if scaling is None:
        return 1.0 / powers
    if scaling.rope_type == "longrope":
        return 1.0 / (torch.tensor(scaling.factors) * powers)
    if scaling.rope_type == "yarn":
        return _yarn(powers, scaling, spec.rope_theta)
    if scaling.rope_type == "linear":
        return 1.0 / powers / scaling.factor
    return _llama3(1.0 / powers, scaling)


def query_scale(spec: ModelSpec, position_ids: Tensor) -> Tensor:
    """Return what queries at `position_ids` [B, S] are multiplied by, as [B, 1, S, 1] in float32.

    1 + beta log(1 + floor(position / length)): Llama 4, and transformers' `ministral3`.
    """
    rope = spec.rope
    turns = torch.div(position_ids, rope.query_scale_length, rounding_mode="floor")  # [B, S]
    scale = 1 + rope.query_scale * torch.log(1 + turns.float())  # [B, S]
    return scale.unsqueeze(1).unsqueeze(-1)  # [B, 1, S, 1]


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Divide low frequencies by `factor`, keep high ones, blend in between (Llama 3.1)."""
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # [R/2]
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # [R/2]
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def _yarn(powers: Tensor, scaling: RopeScaling, theta: float) -> Tensor:
    """Divide by `factor` the pairs that turn less than `beta_slow` times in the trained length.

    Pairs that turn more than `beta_fast` times are kept; between the two, pairs are blended by
    their index (Peng et al. 2023, arXiv:2309.00071, section 3.2).
    """
    count = len(powers)  # R/2

    def pair_that_turns(times: float) -> float:
        length = scaling.original_max_position_embeddings
        return count * math.log(length / (times * 2 * math.pi)) / math.log(theta)

    first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * count - 1)
    width = last - first if last != first else 0.001  # as transformers avoids dividing by 0
    divided = ((torch.arange(count).float() - first) / width).clamp(0, 1)  # [R/2]
    kept = 1 - divided
    return 1.0 / (scaling.factor * powers) * (1 - kept) + 1.0 / powers * kept
