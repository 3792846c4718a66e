"""Every family of models against transformers, and as a bundle for each target.

    python -m benchmarks.checkpoints.families [--targets cpu cuda rtx] [--only NAME …]

Checkpoints of two layers with random weights, written by transformers, as the tests use them
(`tests/support/families.py`). The first columns are the largest differences of logits, as a share
of the largest logit: of the PyTorch decoder from transformers in float32 and eager, over texts of
up to five windows, and of the finished bundle from the decoder. Engines are built, which needs no
GPU, and audited; the column says what was found, or why the target is refused. Prints the table,
and what it ran on.
"""

import argparse
import contextlib
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from exporter.checkpoint.open import open_checkpoint
from exporter.decoder.load import load_decoder
from exporter.export import export
from exporter.options import ExportOptions
from graphs.errors import UsageError
from graphs.targets import TARGETS
from runtime.measure.bench import machine
from tests.support import families, tiny
from tests.support.make_checkpoint import tiny_spec, write_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="*", choices=TARGETS, default=["cpu", "cuda", "rtx"])
    parser.add_argument("--only", nargs="+", choices=families.EXAMPLES, metavar="NAME")
    arguments = parser.parse_args()
    targets: list[str] = arguments.targets
    print(" | ".join(["| model", "windows", "texts", "decoder", *(f"`{t}`" for t in targets)]), "|")
    print("|", " | ".join(["---"] * (4 + len(targets))), "|")
    for name in arguments.only or families.EXAMPLES:
        cells = [name, *compared(name), *(built(name, target) for target in targets)]
        print("|", " | ".join(cells), "|", flush=True)
    print(f"\n{machine()}")


def compared(name: str) -> Iterator[str]:
    """The windows, the lengths of the texts, and the largest difference from transformers."""
    lengths = families.EXAMPLES[name].lengths
    with TemporaryDirectory() as folder:
        checkpoint = open_checkpoint(families.write(Path(folder), name))
        spec = checkpoint.spec
        yield ", ".join("none" if size is None else str(size) for size in spec.windows)
        yield ", ".join(map(str, lengths))
        worst = 0.0
        for length in lengths:
            scaling = spec.rope_scaling and spec.rope_scaling.for_context(length)
            decoder = load_decoder(replace(spec, rope_scaling=scaling), checkpoint.tensor)
            ids = tiny.tokens(spec, length)
            expected = families.logits(name, ids.tolist())
            got = torch.from_numpy(tiny.at_once(decoder, ids))
            worst = max(worst, float((got - expected).abs().max() / expected.abs().max()))
        yield f"{worst:.1e}"


def built(name: str, target: str) -> str:
    """Export an example for a target; returns what verification or the audit found."""
    with TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        source = families.write(Path(folder) / "checkpoint", name, wide=True)
        write_tokenizer(source, tiny_spec(vocab_size=families.WIDE["vocab_size"]))
        options = ExportOptions(target=target, allow_faults=True)
        try:
            manifest = export(str(source), Path(folder) / "bundle", options)
        except UsageError as refusal:
            return f"refused: {refusal}"
    if manifest.engine is not None:
        engine = manifest.engine
        faults = "; ".join(engine["faults"]) or "no faults"
        return f"built, {engine['attention_fused']} of {engine['attention']} fused, {faults}"
    if manifest.verification is not None:
        return f"{max(case['max_rel'] for case in manifest.verification['cases']):.1e}"
    return f"exported, {len(manifest.golden)} golden texts"


if __name__ == "__main__":
    main()
