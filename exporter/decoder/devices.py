"""The device on which PyTorch computes the reference. Knows nothing about models."""

import torch

from graphs.errors import UsageError

DEVICES = ("cpu", "cuda")


def reference_device(name: str) -> torch.device:
    """The device of that name. Raises UsageError unless this PyTorch can use it here."""
    if name not in DEVICES:
        raise UsageError(f"--device is {name!r}; expected one of {', '.join(DEVICES)}.")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"--device is cuda, and PyTorch {torch.__version__} finds no GPU here; expected a "
            "build of PyTorch with CUDA and a host with a GPU. Omit --device to use the processor."
        )
    return torch.device(name)
