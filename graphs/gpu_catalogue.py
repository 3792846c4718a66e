"""NVIDIA GPUs as their vendor's documents describe them, whatever GPU is present.

`source` names the document that a figure is published in; most were checked against pages that
quote it, not against the document itself. The B200 is left out on purpose: published figures
differ in memory (180 and 192 GB) and bandwidth (7.7 and 8 TB/s).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from graphs.errors import UsageError

GB = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One model of GPU. `source` names the vendor document that states memory and bandwidth.

    `memory_bytes` reads the document's "24 GB" as 24 * 10^9, although the chips hold 24 * 2^30:
    the difference of 7 % covers what error correction (6.25 % on GDDR6) and firmware take.
    """

    name: str
    compute_capability: str
    memory_bytes: int
    bandwidth_bytes_per_s: int
    source: str


def version(compute_capability: str) -> tuple[int, int]:
    """Return "8.9" as (8, 9), which compares correctly: 12.0 is newer than 8.9."""
    major, _, minor = compute_capability.partition(".")
    return int(major), int(minor)


def find_gpu(name: str) -> Gpu:
    """Look up a GPU by a name such as `rtx4090`, `RTX 4090` or `h100-pcie`; `a100` has 80 GB.

    Raises UsageError that lists the known names.
    """
    keys = {_plain(key): key for key in (*GPUS, *ALIASES)}
    key = keys.get(_plain(name).removeprefix("geforce"))
    if key is None:
        raise UsageError(
            f"--gpu is {name!r}, which is not in the table; expected one of {', '.join(GPUS)}. "
            "For another GPU, choose the listed one that is closest in memory and bandwidth."
        )
    return GPUS[ALIASES.get(key, key)]


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _gpu(name: str, capability: str, memory: int, bandwidth: int, source: str) -> Gpu:
    return Gpu(
        name=name,
        compute_capability=capability,
        memory_bytes=memory * GB,
        bandwidth_bytes_per_s=bandwidth * GB,
        source=source,
    )


GPUS: Mapping[str, Gpu] = {
    "rtx3090": _gpu("GeForce RTX 3090", "8.6", 24, 936,
                    "NVIDIA Ampere GA102 GPU Architecture whitepaper"),
    "rtx4090": _gpu("GeForce RTX 4090", "8.9", 24, 1008,
                    "NVIDIA Ada GPU Architecture whitepaper"),
    "rtx5090": _gpu("GeForce RTX 5090", "12.0", 32, 1792,
                    "NVIDIA RTX Blackwell GPU Architecture whitepaper"),
    "rtx6000ada": _gpu("RTX 6000 Ada Generation", "8.9", 48, 960,
                       "NVIDIA RTX 6000 Ada Generation datasheet"),
    "a10": _gpu("A10", "8.6", 24, 600, "NVIDIA A10 Tensor Core GPU datasheet"),
    "l4": _gpu("L4", "8.9", 24, 300, "NVIDIA L4 Tensor Core GPU datasheet"),
    "l40s": _gpu("L40S", "8.9", 48, 864, "NVIDIA L40S GPU datasheet"),
    "a100-40gb": _gpu("A100 40 GB", "8.0", 40, 1555, "NVIDIA A100 Tensor Core GPU datasheet"),
    "a100-80gb": _gpu("A100 SXM 80 GB", "8.0", 80, 2039,
                      "NVIDIA A100 Tensor Core GPU datasheet"),
    "h100": _gpu("H100 SXM", "9.0", 80, 3350, "NVIDIA H100 Tensor Core GPU datasheet"),
    "h100-pcie": _gpu("H100 PCIe", "9.0", 80, 2000, "NVIDIA H100 Tensor Core GPU datasheet"),
    "h200": _gpu("H200", "9.0", 141, 4800, "NVIDIA H200 Tensor Core GPU datasheet"),
}  # fmt: skip
"""By the name that `--gpu` takes."""

ALIASES: Mapping[str, str] = {"a100": "a100-80gb"}
