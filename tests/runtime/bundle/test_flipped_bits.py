"""One flipped bit anywhere in a bundle is refused. Runs no model."""

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from graphs.errors import MistralcError
from runtime.bundle import signature
from runtime.bundle.open import open_bundle

TRIALS = 200


def flip(path: Path, bit: int) -> None:
    """Flip one bit of a file in place."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def test_a_flipped_bit_in_any_file_is_always_refused(
    sliding_bundle: Path, copy_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    bundle, key = copy_of(sliding_bundle), tmp_path / "key"
    signature.write_keys(key)
    public = signature.public_path(key)
    signed, _ = signature.sign((bundle / "manifest.json").read_bytes(), key)
    signature.write_signature(bundle, signed)
    files = sorted(path for path in bundle.rglob("*") if path.is_file())
    draw, hits = random.Random(0), Counter[str]()  # noqa: S311  (not used for security)
    for _ in range(TRIALS):
        path = draw.choice(files)  # all files equally often, whatever their size
        bit = draw.randrange(8 * path.stat().st_size)
        name = path.relative_to(bundle).as_posix()
        hits[name] += 1
        flip(path, bit)
        assert refused(bundle, public), f"the flipped bit {bit} of {name} was not detected"
        if name != "manifest.sig":  # not read unless a signature is required
            assert refused(bundle), f"bit {bit} of {name}, without a signature"
        flip(path, bit)
    assert len(hits) == len(files), "some file was never drawn"
    assert {"manifest.json", "manifest.sig", "run.pyz", "model.onnx"} <= set(hits)
    assert not refused(bundle, public), "with all bits restored the bundle must open"


def refused(bundle: Path, require_signature: Path | None = None) -> bool:
    """Whether opening the bundle raises MistralcError."""
    try:
        open_bundle(bundle, require_signature=require_signature)
    except MistralcError:
        return True
    return False
