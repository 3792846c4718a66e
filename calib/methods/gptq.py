"""GPTQ: codes whose errors cancel each other. Knows no model, and chooses no scales.

After Frantar et al. 2022 (arXiv:2210.17323). Input features are rounded one after the other, the
ones with the largest inputs first, and what each rounding does to the output is made up for by
the features that are still to come. Scales are those of the blocks as they lie, chosen before.
"""

import torch
from torch import Tensor

from exporter.quantization.rounding import Quantized, nearest_code
from graphs.quant_scheme import Scheme

DAMPING = 0.01  # of H's mean diagonal, added to it: the paper's
PIECE = 128  # features whose effect on later ones is gathered into one product


def compensated(
    weight: Tensor, rounded: Quantized, second_moment: Tensor, damping: float = DAMPING
) -> Quantized:
    """Choose the codes of `weight` [N, K] anew, with the scales and zero points of `rounded`.

    `second_moment` is X^T X / T, [K, K], of the inputs. Rows are independent, so the linears of a
    group may be stacked.
    """
    scheme, count = rounded.scheme, weight.shape[1]
    order = second_moment.diagonal().argsort(descending=True, stable=True)
    factor = _inverse_factor(second_moment, order, damping)  # [K, K], upper
    scale = _by_feature(rounded.scale, scheme, count)[order]  # [K, N]
    zero = None
    if rounded.zero_point is not None:
        zero = _by_feature(rounded.zero_point.float(), scheme, count)[order]
    left = weight.float().T[order]  # [K, N], what is still to be represented
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
    """Add a share of the mean diagonal to the diagonal, so that the matrix has an inverse.

    In place.
    """
    diagonal = second_moment.diagonal()
    diagonal += max(damping * float(diagonal.mean()), torch.finfo(diagonal.dtype).tiny)
    return second_moment


def _inverse_factor(second_moment: Tensor, order: Tensor, damping: float) -> Tensor:
    """Return U with U^T U = H^-1, upper triangular, of H in the order of features given.

    Where samples leave H so close to singular that float32 finds it indefinite, the damping grows.
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
    raise AssertionError("a second moment is positive semidefinite, and this one is not")


def _by_feature(values: Tensor, scheme: Scheme, count: int) -> Tensor:
    """Spread one value a block [N, J] over the features: [K, N]."""
    return values.repeat_interleave(scheme.block or count, dim=1)[:, :count].T


def _nearest(codes: Tensor, zero_point: Tensor | None, scheme: Scheme) -> Tensor:
    """The nearest code, as a float."""
    if zero_point is not None:
        codes = codes + zero_point
    return nearest_code(codes, scheme.codes).float()


def corrected(weight: Tensor, second_moment: Tensor, drift: Tensor, share: float) -> Tensor:
    """Return the weight [N, K] that gives, from quantized inputs, what the float model has.

    With inputs X where the float model has F, the least squares solution of X V^T = F W^T is
    V = W + W (F - X)^T X (X^T X)^-1, which is what GPTAQ (arXiv:2504.02692) rounds towards.
    `drift` is X^T (F - X) / T; `share` of the correction is made.
    """
    lower = torch.linalg.cholesky(damped(second_moment.clone(), DAMPING))
    return weight + share * torch.cholesky_solve(drift @ weight.T, lower).T
