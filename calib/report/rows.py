"""One row of a report: a bundle's size, speed limit and quality. Knows no file and no session.

Sizes follow from the manifest alone. Decoding one token reads every weight once, so the bytes of
the weights limit the speed of decoding on any machine.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from graphs.manifest import Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleRow:
    """One bundle's measurements. The last three are None without a reference.

    `method` is the quantization method. `read_bytes` are the bytes of weights read per decoded
    token, without the KV ring. `kl` is the divergence of the bundle from the reference in nats, and
    `top1` the share, 0 to 1, of positions where both prefer the same token.
    """

    name: str
    precision: str
    method: str
    file_bytes: int
    read_bytes: int
    perplexity: float
    reference_perplexity: float | None = None
    kl: float | None = None
    top1: float | None = None

    @property
    def change(self) -> float | None:
        """Relative change of perplexity from the reference: 0.01 is 1% worse."""
        reference = self.reference_perplexity
        return None if reference is None else self.perplexity / reference - 1


def pareto_front(measured: Sequence[BundleRow]) -> tuple[BundleRow, ...]:
    """Return the rows on the Pareto front of bytes read and perplexity, fewest bytes first.

    Among equal rows the first is taken. A row of infinite perplexity is never on the front.
    """
    found: list[BundleRow] = []
    for one in sorted(measured, key=lambda one: (one.read_bytes, one.perplexity)):
        if one.perplexity < (found[-1].perplexity if found else math.inf):
            found.append(one)
    return tuple(found)


def bundle_name(manifest: Manifest) -> str:
    """Return the bundle's name in reports: precision, quantization method, block size."""
    words = [manifest.precision, method_name(manifest)]
    schemes = manifest.storage.schemes
    if schemes:
        block = Counter(scheme.block for scheme in schemes.values()).most_common(1)[0][0]
        words.append("" if block is None else f"block {block}")
    return " ".join(filter(None, words))


def method_name(manifest: Manifest) -> str:
    """Return the quantization method; empty if nothing is quantized."""
    return str(manifest.quantization["method"]) if manifest.quantization else ""


def with_distinct_names(
    measured: Iterable[BundleRow], labels: Iterable[str]
) -> tuple[BundleRow, ...]:
    """Add its label to the name of every row whose name is not unique."""
    rows = tuple(measured)
    names = [one.name for one in rows]
    return tuple(
        replace(one, name=f"{one.name} ({label})") if names.count(one.name) > 1 else one
        for one, label in zip(rows, labels, strict=True)
    )
