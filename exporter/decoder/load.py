"""Load the decoder's weights: mapped from a checkpoint and converted when they are used.

Knows nothing about graphs or checkpoints: a weight comes from `weight(canonical name)`.
"""

from collections.abc import Callable, Container
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exporter.decoder.model import CPU, Decoder, RMSNorm
from exporter.decoder.rotary import inverse_frequencies
from graphs.spec import ModelSpec

STORED_BLOCK = 1 << 22
"""Weights converted at once: 16 MiB in float32 come from the heap again; 64 MiB are mapped anew."""
KEPT_WEIGHTS = 500_000_000  # of a model whose decoded weights are kept in memory: 2 GB in float32


class StoredLinear(nn.Module):
    """A float32 linear that reads and converts its weight on every call.

    `read` returns the weight [N, K] of any float type, which may be a mapped file. The `bias` [N]
    is float32.
    """

    def __init__(self, read: Callable[[], Tensor], bias: Tensor | None = None) -> None:
        super().__init__()
        self.read, self.bias = read, bias

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x [..., K], converting some rows of the weight at a time; returns [..., N]."""
        weight = self.read()
        blocks = weight.split(max(1, STORED_BLOCK // weight.shape[1]))
        parts = [F.linear(x, rows.to(x.device, torch.float32)) for rows in blocks]
        product = torch.cat(parts, dim=-1)
        return product if self.bias is None else product + self.bias


class StoredEmbedding(StoredLinear):
    """An embedding whose weight is read like that of `StoredLinear`."""

    def forward(self, x: Tensor) -> Tensor:
        """Look up x [B, S]; returns [B, S, E] in float32."""
        weight = self.read()
        return F.embedding(x.to(weight.device), weight).to(x.device, torch.float32)


def reader(spec: ModelSpec, weight: Callable[[str], Tensor], name: str) -> Callable[[], Tensor]:
    """Return what reads one weight: once if the model is small, else anew on every call.

    Mapped weights cost nothing either way. A GGUF file's are decoded to float32, which for a 7B is
    29 GB: decoded on every call, only one of them is in memory at a time.
    """
    read = partial(weight, name)
    return cache(read) if spec.num_parameters <= KEPT_WEIGHTS else read


def load_decoder(
    spec: ModelSpec,
    weight: Callable[[str], Tensor],
    *,
    only: Container[str] | None = None,
    device: torch.device = CPU,
) -> Decoder:
    """Build the reference decoder: float32 arithmetic on the weights `weight(canonical name)`.

    Weights mapped from a checkpoint stay mapped, so a 7B runs in a few hundred megabytes. With
    `only`, just the modules of these names, such as `lm_head`, get their weights, for callers that
    use single stages; `prepare` needs none. Norms, biases and rotary frequencies are on `device`.
    """
    with torch.device("meta"):
        decoder = Decoder(spec)
    head = "model.embed_tokens" if spec.tie_word_embeddings else "lm_head"
    read = cache(partial(reader, spec, weight))  # a tied embedding is read once
    for name, module in list(decoder.named_modules()):
        if only is not None and name not in only:
            continue
        if isinstance(module, nn.Linear):
            stored = f"{head if name == 'lm_head' else name}.weight"
            bias = None
            if module.bias is not None:
                bias = weight(f"{name}.bias").to(device, torch.float32)
            decoder.set_submodule(name, StoredLinear(read(stored), bias))
        elif isinstance(module, nn.Embedding):
            decoder.set_submodule(name, StoredEmbedding(read(f"{name}.weight")))
        elif isinstance(module, RMSNorm):
            gain = weight(f"{name}.weight").to(device, torch.float32)
            module.weight = nn.Parameter(gain, requires_grad=False)
    decoder.inv_freq = inverse_frequencies(spec).to(device)
    return decoder.eval()
