"""Helpers that damage a checkpoint. They assert nothing."""

import json
from pathlib import Path

import numpy as np


def configure(checkpoint: Path, **values: object) -> None:
    """Set `values` in `config.json`."""
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **values}), encoding="utf-8")


def poison(weights: Path, name: str, value: float) -> None:
    """Overwrite one number in the middle of a float32 tensor."""
    data = bytearray(weights.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8:start])[name]["data_offsets"]
    at = start + (begin + end) // 2 // 4 * 4
    data[at : at + 4] = np.float32(value).tobytes()
    weights.write_bytes(data)
