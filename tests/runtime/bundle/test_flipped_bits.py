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
    made, _ = signature.sign((bundle / "manifest.json").read_bytes(), key)
    signature.write_signature(bundle, made)
    files = sorted(path for path in bundle.rglob("*") if path.is_file())
    draw, hit = random.Random(0), Counter[str]()  # noqa: S311  (a sample, not a secret)
    for _ in range(TRIALS):
        path = draw.choice(files)  # each file as often as any other, however small
        bit = draw.randrange(8 * path.stat().st_size)
        name = path.relative_to(bundle).as_posix()
        hit[name] += 1
        flip(path, bit)
        assert refused(bundle, public), f"nobody noticed that bit {bit} of {name} was flipped"
        if name != "manifest.sig":  # nobody looks at it unless it is asked for
            assert refused(bundle), f"bit {bit} of {name}, without a signature"
        flip(path, bit)
    assert len(hit) == len(files), "some file was never drawn"
    assert {"manifest.json", "manifest.sig", "run.pyz", "model.onnx"} <= set(hit)
    assert not refused(bundle, public), "flipped back, it is the bundle that was signed"


def refused(bundle: Path, require_signature: Path | None = None) -> bool:
    """Whether opening says in words that it will not."""
    try:
        open_bundle(bundle, require_signature=require_signature)
    except MistralcError:
        return True
    return False
