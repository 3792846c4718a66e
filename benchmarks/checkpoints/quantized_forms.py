"""Print the table of quantized forms that an export takes, each on a small random model.

    python -m benchmarks.checkpoints.quantized_forms

For every form of the tests: the precision that each target takes by default, how many of the
codes in a CPU bundle's weights equal the checkpoint's bit for bit, and the largest difference of a
logit (float32, eager) between the weights that we read and those that the format's own library
dequantizes, as a share of the largest logit. Forms whose library is not installed are left out.
GGUF types are compared with the gguf package, one weight of 64 x 512 each.
"""

import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import gguf
import safetensors
import torch

from exporter.bundle import weights_file
from exporter.checkpoint.open import Checkpoint, open_checkpoint
from exporter.checkpoint.quantized.gguf_blocks import block_source
from exporter.checkpoint.stored import ByteRange, StoredTensor
from exporter.decide import decide
from exporter.decoder.load import load_decoder
from exporter.decoder.model import logits_at
from exporter.options import BuildOptions
from exporter.quantization.make_recipe import make_recipe, weight_facts
from exporter.quantization.packing import unpack
from graphs.quant_scheme import stored_parts
from graphs.targets import TARGETS
from tests.support import compressed_tensors_forms, tiny
from tests.support.gguf_blocks import KINDS, random_blocks
from tests.support.quantized_forms import FORMS, SPEC, Form, Written, write_form


class Row(NamedTuple):
    """One line of the table."""

    form: str
    precisions: list[str]  # by target
    equal: int  # codes of a CPU bundle that equal the checkpoint's
    codes: int
    difference: float

    def __str__(self) -> str:
        held = f"{self.equal:,} of {self.codes:,}" if self.codes else "none held"
        return f"| {self.form} | {' | '.join(self.precisions)} | {held} | {self.difference:.1e} |"


def row(form: Form, folder: Path) -> Row:
    """Write a form, read it, and compare."""
    written = write_form(folder / "model", form)
    opened = open_checkpoint(written.path)
    facts = weight_facts(opened)
    builds = [decide(opened.spec, target, BuildOptions(), facts) for target in TARGETS.values()]
    equal, codes = _codes_in_bundle(opened, written, folder)
    return Row(form.name, [build.precision.name for build in builds], equal, codes,
               _difference(opened, written))  # fmt: skip


def _codes_in_bundle(opened: Checkpoint, written: Written, folder: Path) -> tuple[int, int]:
    """How many codes of a CPU bundle equal the checkpoint's, and how many there are."""
    build = decide(opened.spec, TARGETS["cpu"], BuildOptions(), weight_facts(opened))
    recipe = make_recipe(build, opened, None)
    weights_file.stream_weights(opened, recipe, folder)
    equal = total = 0
    with safetensors.safe_open(folder / weights_file.FILE_NAME, "pt") as file:
        for name in build.storage.copied:
            scheme, layout = recipe.schemes[name], recipe.layout(name)
            rows, columns = opened.spec.weight_shapes()[name]
            stored = stored_parts(name, (rows, columns), scheme, recipe.activation, layout)
            parts = [file.get_tensor(part.name) for part in stored]
            got, made = unpack(parts, (rows, columns), scheme, layout).codes, written.made[name]
            if made.codes is None:
                raise ValueError(f"{name} has no codes, and the bundle has some")
            equal += int((got.view(torch.uint8) == made.codes.view(torch.uint8)).sum())
            total += got.numel()
    return equal, total


def _difference(opened: Checkpoint, written: Written) -> float:
    """The largest difference of a logit, as a share of the largest logit."""
    ids, rows = torch.from_numpy(tiny.tokens(SPEC, 64)), torch.arange(64)

    def library(name: str) -> torch.Tensor:
        made = written.made.get(name)
        return opened.tensor(name) if made is None else made.weight

    got = logits_at(load_decoder(SPEC, opened.tensor), ids, rows)
    expected = logits_at(load_decoder(SPEC, library), ids, rows)
    return float((got - expected).abs().max() / expected.abs().max())


def gguf_rows(folder: Path) -> Iterator[str]:
    """Yield a line per block type: codes, block, largest difference of a weight."""
    for kind in KINDS:
        data, shape = random_blocks(kind, 64, 512), (64, 512)
        (folder / kind).write_bytes(data.tobytes())
        where = ByteRange(path=folder / kind, offset=0, length=data.nbytes, dtype=kind)
        source = block_source(StoredTensor(name=kind, shape=shape, where=where))
        expected = torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType[kind]))
        if source.quantized is None:
            raise ValueError(f"{kind} has no codes")
        scheme, read = source.quantized
        difference = (read().dequantized() - expected.view(shape)).abs().max()
        share = float(difference / expected.abs().max())
        offset = "" if scheme.offset == "none" else f" and {scheme.offset}"
        yield f"| {kind} | {scheme.codes} | {scheme.block} | scale{offset} | {share:.1e} |"


def main() -> None:
    forms = [*FORMS]
    if importlib.util.find_spec("compressed_tensors") is None:
        print("compressed-tensors is not installed; its forms are left out.", file=sys.stderr)
    else:
        forms += compressed_tensors_forms.FORMS
    print(f"| form | {' | '.join(TARGETS)} | codes equal, cpu | largest logit difference |")
    print(f"| --- | {' | '.join('---' for _ in TARGETS)} | ---: | ---: |")
    for form in forms:
        with tempfile.TemporaryDirectory() as folder:
            print(row(form, Path(folder)), flush=True)
    print("\n| GGUF type | codes | block | beside them | largest difference |")
    print("| --- | --- | ---: | --- | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        for line in gguf_rows(Path(folder)):
            print(line)


if __name__ == "__main__":
    main()
