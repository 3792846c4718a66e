"""Every form of PEFT adapter, merged by mistralc and by peft.

    python -m benchmarks.checkpoints.adapters

A checkpoint of two layers with random weights, and adapters that peft makes for it
(`tests/support/adapters.py`), on an output layer of its own and on one that is the embedding. Each
row has the number of weights whose bits are those of peft's `merge_and_unload`, and the largest
difference of logits of the PyTorch decoder from transformers (float32, eager) over a text of five
windows, as a share of the largest logit. Prints the table, and what it ran on.
"""

import argparse
import contextlib
import io
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from exporter.checkpoint.open import open_checkpoint
from exporter.decoder.load import load_decoder
from runtime.measure.bench import machine
from tests.support import adapters, tiny
from tests.support.make_checkpoint import tiny_spec, write_checkpoint

WINDOW = 8


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    warnings.simplefilter("ignore")
    print("| adapter | output layer | weights as peft's | logits |\n| --- | --- | ---: | ---: |")
    for tied in (False, True):
        for form in adapters.FORMS:
            with TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
                same, count, worst = compared(Path(folder), form, tied=tied)
            layer = "tied" if tied else "its own"
            print(f"| {form} | {layer} | {same} of {count} | {worst:.1e} |", flush=True)
    print(f"\n{machine()}")


def compared(folder: Path, form: str, *, tied: bool) -> tuple[int, int, float]:
    """Weights that are equal, all weights, and the largest difference of logits."""
    spec = tiny_spec(window=WINDOW, vocab_size=64, tie_word_embeddings=tied)
    base, options = write_checkpoint(folder / "base", spec), adapters.FORMS[form]
    adapter = adapters.make(base, folder / "adapter", options)
    merged = adapters.merge(base, [(adapter, 1.0)], resize=options.get("resize", 0))
    checkpoint = open_checkpoint(base, [str(adapter)])
    expected = merged.state_dict()
    names = list(checkpoint.spec.weight_shapes())
    same = sum(torch.equal(checkpoint.tensor(name), expected[name]) for name in names)
    ids = tiny.tokens(checkpoint.spec, 5 * WINDOW)
    with torch.no_grad():
        theirs = merged(torch.from_numpy(ids)[None]).logits[0]
    decoder = load_decoder(checkpoint.spec, checkpoint.tensor)
    ours = torch.from_numpy(tiny.at_once(decoder, ids))
    return same, len(names), float((ours - theirs).abs().max() / theirs.abs().max())


if __name__ == "__main__":
    main()
