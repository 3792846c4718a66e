"""Import time of the runtime, and the modules that it imports."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

PROGRAM = """
import sys, time
began = time.perf_counter()
import runtime.decoding.generator
seconds = time.perf_counter() - began
heavy = {"torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "transformers", "safetensors"}
print(seconds, *sorted(heavy & sys.modules.keys()))
"""


def import_generator() -> tuple[float, list[str]]:
    """Seconds that the import takes in a new interpreter, and the heavy modules that it loads."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    seconds, *heavy = done.stdout.split()
    return float(seconds), heavy


def test_the_generator_imports_no_build_tools_and_no_backend():
    _, heavy = import_generator()
    assert heavy == [], "these take seconds to import, and a production host lacks most of them"


def test_the_generator_imports_in_under_300_ms():
    # The minimum of five: other processes can only slow an import down. Most of it is NumPy; a
    # busy machine took 0.13 s.
    fastest = min(import_generator()[0] for _ in range(5))
    assert fastest < 0.3, f"import runtime.decoding.generator takes {fastest:.2f} s at best"
