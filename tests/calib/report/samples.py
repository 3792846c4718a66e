"""Rows, facts and SVG parsing for the tests of reports. Asserts nothing."""

from typing import Any
from xml.etree import ElementTree

from calib.report.rows import BundleRow
from calib.report.sections import Report

SVG = "{http://www.w3.org/2000/svg}"
GROUP_KINDS = ("qkv", "o", "gate_up", "down")


def bundle(name: str, read: int, perplexity: float, **more: Any) -> BundleRow:
    return BundleRow(
        name=name, precision=name, method="", file_bytes=read + 1000, read_bytes=read,
        perplexity=perplexity, **more,
    )  # fmt: skip


FLOAT = bundle("fp32", 400_000_000, 10.0, reference_perplexity=10.0, kl=1e-10, top1=1.0)
EIGHT = bundle("int8wo", 120_000_000, 10.1, reference_perplexity=10.0, kl=1e-3, top1=0.99)
FOUR = bundle("int4wo awq", 70_000_000, 10.8, reference_perplexity=10.0, kl=0.05, top1=0.9)
WORSE = bundle(
    "int8 <i>nearest</i>", 121_000_000, 11.0, reference_perplexity=10.0, kl=0.1, top1=0.8
)
ALL = (FLOAT, EIGHT, FOUR, WORSE)


def facts(layers: int = 3) -> dict[str, Any]:
    """Facts of every group: calibration halves the error, smoothing the range to a tenth."""
    names = [f"model.layers.{layer}.{kind}" for layer in range(layers) for kind in GROUP_KINDS]
    return {
        "groups": {
            name: {"error_before": 0.02 / at, "error": 0.01 / at, "peak_before": 500.0 / at,
                   "peak": 50.0 / at}
            for at, name in enumerate(names, start=1)
        },
        "kept": {"groups": ["model.layers.1.down"],
                 "kl_alone": {name: 0.001 * at for at, name in enumerate(names, start=1)}},
        "coverage": [{"window": 4096, "tokens": 20_480, "beyond": 4096}],
    }  # fmt: skip


def full_report() -> Report:
    origin = {"text": "a <b>text</b> & more", "windows": "2 of 512"}
    return Report(measured=ALL, origin=origin, calibration={"calibration": "awq"}, facts=facts())


def text_labels(svg: str) -> list[str]:
    return ["".join(text.itertext()) for text in parsed(svg).iter(f"{SVG}text")]


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)  # noqa: S314 - drawn here
