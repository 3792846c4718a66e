"""GPTQ: choose codes whose errors compensate each other. Scales are given, not chosen here.

After Frantar et al. 2022 (arXiv:2210.17323). Input features are rounded one by one, those with the
largest inputs first; the features not yet rounded are adjusted to cancel each rounding's effect on
the output. Blocks keep their place in the weight, whatever the order of rounding.
"""

import torch
from torch import Tensor

from exporter.checkpoint.quantized.value import Quantized
from exporter.quantization.rounding import nearest_code
from graphs.quant_scheme import Scheme

DAMPING = 0.01  # share of H's mean diagonal that is added to the diagonal, as in the paper
PIECE = 128  # features whose effect on later ones is applied in one matrix product


def gptq_codes(
    weight: Tensor, rounded: Quantized, second_moment: Tensor, damping: float = DAMPING
) -> Quantized:
    """Choose the codes of `weight` [N, K] again, with the scales and zero points of `rounded`.

    `second_moment` is X^T X / T [K, K] of the inputs. Rows are independent, so the linears of a
    group can be stacked.
    """
    scheme, count = rounded.scheme, weight.shape[1]
    order = second_moment.diagonal().argsort(descending=True, stable=True)
    factor = _inverse_factor(second_moment, order, damping)  # [K, K], upper
    scale = _by_feature(rounded.scale, scheme, count)[order]  # [K, N]
    zero = None
    if rounded.zero_point is not None:
        zero = _by_feature(rounded.zero_point.float(), scheme, count)[order]
    left = weight.float().T[order]  # [K, N], the weight left to represent
    codes = torch.empty_like(left)
    for start in range(0, count, PIECE):
        end = min(start + PIECE, count)
        errors = torch.empty_like(left[start:end])  # [piece, N]
        for i in range(start, end):
            offset = None if zero is None else zero[i]
            codes[i] = _nearest(left[i] / scale[i], offset, scheme)
            value = codes[i] if offset is None else codes[i] - offset
            error = (left[i] - value * scale[i]) / factor[i, i]
            left[i + 1 : end].addr_(factor[i, i + 1 : end], error, alpha=-1)
            errors[i - start] = error
        left[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    placed = torch.empty_like(codes)
    placed[order] = codes
    return Quantized(
        scheme=scheme, codes=placed.T.contiguous().to(rounded.codes.dtype), scale=rounded.scale,
        zero_point=rounded.zero_point,
    )  # fmt: skip


def damped(second_moment: Tensor, damping: float) -> Tensor:
    """Make [K, K] invertible, in place: add a share of the mean diagonal to the diagonal."""
    diagonal = second_moment.diagonal()
    diagonal += max(damping * float(diagonal.mean()), torch.finfo(diagonal.dtype).tiny)
    return second_moment


def _inverse_factor(second_moment: Tensor, order: Tensor, damping: float) -> Tensor:
    """Return the upper triangular U [K, K] with U^T U = H^-1, features of H in the given order.

    If H is so close to singular that it is indefinite in float32, the damping is increased.
    """
    for _ in range(8):
        lower, failed = torch.linalg.cholesky_ex(damped(second_moment[order][:, order], damping))
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            del lower  # 0.8 GB at 14,336 features, like every matrix here
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                factor: Tensor = upper
                return factor
        damping = max(10 * damping, DAMPING)
    raise AssertionError("the second moment is not positive semidefinite")


def _by_feature(values: Tensor, scheme: Scheme, count: int) -> Tensor:
    """Repeat the value of each block [N, J] for its features: [K, N]."""
    return values.repeat_interleave(scheme.block or count, dim=1)[:, :count].T


def _nearest(codes: Tensor, zero_point: Tensor | None, scheme: Scheme) -> Tensor:
    """Round to the nearest code, returned as float; shape unchanged."""
    if zero_point is not None:
        codes = codes + zero_point
    return nearest_code(codes, scheme.codes).float()


def drift_corrected(weight: Tensor, second_moment: Tensor, drift: Tensor, share: float) -> Tensor:
    """Return the weight V [N, K] that best reproduces the float model's output.

    With inputs X of the quantized model and F of the float model, the least-squares solution of
    X V^T = F W^T is V = W + W (F - X)^T X (X^T X)^-1, the target that GPTAQ (arXiv:2504.02692)
    rounds to. `drift` is X^T (F - X) / T [K, K]; only `share` of the correction is applied.
    """
    lower = torch.linalg.cholesky(damped(second_moment.clone(), DAMPING))
    return weight + share * torch.cholesky_solve(drift @ weight.T, lower).T
