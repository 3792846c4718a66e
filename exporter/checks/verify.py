"""Does a bundle compute what the PyTorch decoder computes? Knows nothing about writing bundles.

The reference runs the whole text in one pass, with a ring as long as the text that never wraps;
the bundle runs it the way it is used, in pieces, over its own ring. They agree only if window,
ring, rotary angles, graph passes and runtime are all right.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from numpy.typing import NDArray

from exporter.bundle.weights_file import FILE_NAME
from exporter.checkpoint.open import Checkpoint, open_checkpoint
from exporter.checkpoint.quantized.value import Quantized
from exporter.checkpoint.read_ahead import ReadAhead
from exporter.checks.reference_pass import Logits, case_texts
from exporter.checks.texts import Case, LeftOut, cases
from exporter.decoder.model import CPU, Decoder, logits_at
from exporter.quantization.calibration_table import CalibrationTable
from exporter.quantization.make_recipe import carried_codes, stored_recipe
from exporter.quantization.packing import unpack
from exporter.quantization.recipe import Recipe
from exporter.quantization.reference import simulate
from graphs.build import Build
from graphs.dtypes import Dtype
from graphs.errors import MistralcError
from graphs.manifest import Manifest
from graphs.quant_scheme import stored_parts
from runtime.backends.session import Session, fewest_rows
from runtime.decoding.sequence import Sequence
from runtime.load import make_ring

Progress = Callable[[int], None]  # called with the number of tokens just run

TOLERANCE: Mapping[Dtype, float] = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest logit difference accepted, as a share of the largest logit (at least 1), by activation.

Summation order differs between backends: SmolLM2's 30 layers were seen to differ by 7e-6 of the
largest logit on random tokens, where float32 itself is 2e-5 away from float64. A wrong mask, slot
or angle shows up as 1e-1 and more. The bounds for float16 and bfloat16 are estimates from the
width of their significands: no engine has been measured yet.
"""
ROUNDED_KL = 0.1
"""Mean divergence, in nats, accepted instead where inputs are rounded to 8 bits while computing.

A number that summation order pushes over the edge between two codes is off by a whole step, and on
random tokens the layers after it carry that on: SmolLM2's logits were off by up to 46 % of the
largest while the divergence was 0.005 to 0.03 nats. A tiny model without such a number agrees to
5e-7. A wrong mask, scale or code shows up as 1 nat and more.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How close the bundle is to the reference on one case, over the compared positions.

    `max_abs` is in logits, `max_rel` a share of the largest logit, `kl` the mean Kullback-Leibler
    divergence in nats of the bundle's distribution from the reference's, `top1` the share of
    positions where both prefer the same token.
    """

    case: str
    tokens: int
    max_abs: float
    max_rel: float
    kl: float
    top1: float
    tolerance: float
    tolerance_kl: float | None = None  # of bundles that round inputs, and counts instead

    @property
    def passed(self) -> bool:
        """Whether the difference is one of summation order only."""
        if self.tolerance_kl is not None:
            return self.kl <= self.tolerance_kl
        return self.max_rel <= self.tolerance

    @property
    def allowed(self) -> str:
        """What counts, in words."""
        if self.tolerance_kl is not None:
            return f"a divergence of {self.tolerance_kl:g} nats"
        return f"{self.tolerance:.0e} of the largest logit"


def verify(
    session: Session,
    build: Build,
    reference: Decoder,
    *,
    short: bool,
    progress: Progress | None = None,
) -> list[Agreement]:
    """Run every case on both and compare. The reference holds one case's logits at a time."""
    chosen = cases(build, short=short)
    expected = (
        logits_at(reference, ids[0], rows).numpy() for ids, rows in case_texts(build, chosen)
    )
    return compare(session, build, chosen, expected, progress)


def compare(
    session: Session,
    build: Build,
    chosen: list[Case],
    expected: Iterable[Logits],
    progress: Progress | None = None,
) -> list[Agreement]:
    """Run the cases on the bundle and compare with the logits [T, V] that the reference gave."""
    found = []
    texts = case_texts(build, chosen)
    for case, text, logits in zip(chosen, texts, expected, strict=True):
        ids, wanted = text.ids[0].numpy(), text.rows.numpy()
        got = np.concatenate(list(_bundle_logits(session, build, case, ids, wanted, progress)))
        found.append(_compare(case, got, logits, build))
    return found


def require(agreements: list[Agreement]) -> None:
    """Raise MistralcError unless every case passed."""
    failed = [a for a in agreements if not a.passed]
    if failed:
        worst = max(failed, key=lambda a: (a.kl, a.max_rel))
        raise MistralcError(
            f"The bundle does not compute what the checkpoint does: in case {worst.case} "
            f"({worst.tokens} tokens) logits differ by up to {worst.max_abs:.3g}, "
            f"{worst.max_rel:.3%} of the largest, a divergence of {worst.kl:.3g} nats, and "
            f"{worst.allowed} is allowed; the likeliest token agrees at {worst.top1:.1%} of "
            "positions. Please report this with the versions in the bundle's manifest; another "
            "version of the backend may not have the fault."
        )


def to_json(
    agreements: list[Agreement], against: str, left_out: Iterable[LeftOut] = ()
) -> dict[str, Any]:
    """Return the manifest's record of a verification, and of the cases that it left out."""
    passed = all(a.passed for a in agreements)
    return {"against": against, "passed": passed, "allowed": agreements[0].allowed,
            "cases": [asdict(a) for a in agreements],
            **({"left_out": rest} if (rest := [*map(asdict, left_out)]) else {})}  # fmt: skip


def to_markdown(record: Mapping[str, Any]) -> str:
    """Return a verification's record as the table that goes into `report/verify.md`."""
    lines = [
        "# Verification",
        "",
        f"Logits of this bundle against the PyTorch decoder, float32, with {record['against']}.",
        "",
        "| case | tokens | max abs | max rel | KL (nats) | top-1 agreement |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {a['case']} | {a['tokens']} | {a['max_abs']:.2e} | {a['max_rel']:.2e} "
        f"| {a['kl']:.2e} | {a['top1']:.2%} |"
        for a in record["cases"]
    ]
    verdict = "passed" if record["passed"] else "FAILED"
    lines += ["", f"Verdict: {verdict} (allowed: {record['allowed']}).", ""]
    left_out = record.get("left_out", ())
    if left_out:
        lines += ["Left out:", ""]
        lines += [f"- {one['case']} ({one['tokens']:,} tokens): {one['why']}." for one in left_out]
        lines += [""]
    return "\n".join(lines)


def bundle_reference(bundle: Path, manifest: Manifest, device: torch.device = CPU) -> Decoder:
    """Build the reference on a bundle's own `weights.safetensors`, codes and all."""
    if not (bundle / FILE_NAME).exists():
        raise MistralcError(
            f"{bundle} holds an engine, whose weights cannot be read back. Compare it with the "
            "checkpoint that it was made of: add --against CHECKPOINT."
        )
    file = safetensors.safe_open(bundle / FILE_NAME, framework="pt")
    recipe = stored_recipe(manifest.build, manifest.quantization)
    read = {name: partial(_unpacked, file, name, recipe) for name in recipe.schemes}
    return simulate(replace(recipe, repacked=read), file.get_tensor, device=device)


def same_checkpoint(source: str, manifest: Manifest, lora: Iterable[str] = ()) -> Checkpoint:
    """Open the checkpoint `source`. Raises MistralcError unless the bundle was made of it."""
    checkpoint = open_checkpoint(source, tuple(lora))
    found, expected = checkpoint.fingerprint(), manifest.checkpoint["fingerprint"]
    merged = manifest.checkpoint.get("adapters")
    if found != expected:
        raise MistralcError(
            f"The bundle was made of {manifest.checkpoint['name']}"
            f"{f' with the adapters {merged}' if merged else ''} (fingerprint {expected[:12]}…), "
            f"and {source} is another checkpoint (fingerprint {found[:12]}…). Give the one it was "
            "made of, or leave --against out to compare with the bundle's own weights."
        )
    return checkpoint


def checkpoint_reference(
    source: str,
    manifest: Manifest,
    table: CalibrationTable | None,
    device: torch.device = CPU,
    lora: Iterable[str] = (),
) -> Decoder:
    """Build the reference on the checkpoint `source`, which must be the one of the bundle.

    A bundle that was made with a table of calibration needs that table.
    """
    checkpoint = same_checkpoint(source, manifest, lora)
    facts = manifest.quantization or {}
    wanted = facts.get("calibration")
    if wanted != (None if table is None else table.fingerprint):
        raise MistralcError(
            f"The bundle was made {f'with the calibration table {wanted[:12]}…' if wanted else ''}"
            f"{'' if wanted else 'without a calibration table'}, and "
            f"{'none' if table is None else table.fingerprint[:12] + '…'} was given. "
            "Give the one it was made with as --calibration, or leave --against out."
        )
    recipe = stored_recipe(manifest.build, manifest.quantization)
    exact = carried_codes(manifest.build, checkpoint)
    tensors = recipe.tensors if table is None else table.tensors
    recipe = replace(recipe, tensors=tensors, repacked=exact)
    return simulate(recipe, ReadAhead(checkpoint), device=device)


def _bundle_logits(
    session: Session,
    build: Build,
    case: Case,
    ids: NDArray[np.int64],
    wanted: NDArray[np.int64],
    progress: Progress | None,
) -> Iterator[Logits]:
    sequence = Sequence(session, make_ring(build), fewest_rows(session))
    for turn in case.turns:
        begin = sequence.position
        end = begin + turn
        rows = wanted[(wanted >= begin) & (wanted < end)] - begin
        for piece in sequence.feed(ids[begin:end], rows):
            if progress is not None:
                progress(piece.length)
            yield piece.logits.copy()


def _unpacked(file: Any, name: str, recipe: Recipe) -> Quantized:
    scheme, layout = recipe.schemes[name], recipe.layout(name)
    rows, columns = shape = recipe.spec.weight_shapes()[name]
    stored = stored_parts(name, shape, scheme, recipe.activation, layout)
    parts = [file.get_tensor(part.name) for part in stored]
    return unpack(parts, (rows, columns), scheme, layout)


def _compare(case: Case, got: Logits, expected: Logits, build: Build) -> Agreement:
    if not np.isfinite(got).all():
        raise MistralcError(
            f"The bundle's logits hold NaN or infinity in case {case.name} ({case.tokens} tokens); "
            "finite numbers are expected. Please report this with the bundle's manifest."
        )
    difference = float(np.abs(got - expected).max())
    largest = max(1.0, float(np.abs(expected).max()))
    ours, theirs = _log_softmax(got), _log_softmax(expected)
    kl = (np.exp(theirs) * (theirs - ours)).sum(axis=-1)
    return Agreement(
        case=case.name,
        tokens=case.tokens,
        max_abs=difference,
        max_rel=difference / largest,
        kl=float(kl.mean()),
        top1=float((got.argmax(-1) == expected.argmax(-1)).mean()),
        tolerance=TOLERANCE[build.activation],
        tolerance_kl=ROUNDED_KL if build.rounds_inputs else None,
    )


def _log_softmax(logits: Logits) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return result
