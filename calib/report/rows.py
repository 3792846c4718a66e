"""What a report compares: one bundle's size, speed limit and quality. Knows no file and no session.

Sizes follow from the manifest alone. A decoder that makes one token reads every weight once, so
the bytes of its weights are what bounds its speed, whatever the machine.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from graphs.manifest import Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One bundle as a row of the report. The last three are None without a reference.

    `read_bytes` are those of the weights that one decoded token reads, the KV ring apart; `kl` is
    in nats, of the reference from the bundle; `top1` a share from 0 to 1.
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
        """Perplexity against the reference's: 0.01 is one per cent worse."""
        reference = self.reference_perplexity
        return None if reference is None else self.perplexity / reference - 1


def front(measured: Sequence[Measured]) -> tuple[Measured, ...]:
    """Those that no other beats in bytes read and perplexity at once, fewest bytes first.

    Of equals the first counts; a perplexity beyond a float is never among them.
    """
    found: list[Measured] = []
    for one in sorted(measured, key=lambda one: (one.read_bytes, one.perplexity)):
        if one.perplexity < (found[-1].perplexity if found else math.inf):
            found.append(one)
    return tuple(found)


def name_of(manifest: Manifest) -> str:
    """How a report calls a bundle: its precision, and how its weights were made what they are."""
    words = [manifest.precision, method_of(manifest)]
    schemes = manifest.storage.schemes
    if schemes:
        block = Counter(scheme.block for scheme in schemes.values()).most_common(1)[0][0]
        words.append("" if block is None else f"block {block}")
    return " ".join(filter(None, words))


def method_of(manifest: Manifest) -> str:
    """What decided the codes; empty where nothing is quantized."""
    return str(manifest.quantization["method"]) if manifest.quantization else ""


def distinct(measured: Iterable[Measured], labels: Iterable[str]) -> tuple[Measured, ...]:
    """Tell rows of equal names apart by adding their labels."""
    rows = tuple(measured)
    names = [one.name for one in rows]
    return tuple(
        replace(one, name=f"{one.name} ({label})") if names.count(one.name) > 1 else one
        for one, label in zip(rows, labels, strict=True)
    )
