"""The `1/model.py` of a Triton model repository: run the bundle that lies beside it.

The bundle brings its own runtime, in `run.pyz`. Triton's Python needs numpy, tokenizers, jinja2 and
the bundle's backend, but not mistralc.
"""

import importlib
import json
import runpy
from pathlib import Path
from typing import Any

BUNDLE = Path(__file__).absolute().parent / "bundle"


class TritonPythonModel:
    """The model that Triton's Python backend loads, calls and unloads."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the bundle."""
        archive = str(BUNDLE / "run.pyz")
        runpy.run_path(archive)["use"](archive)
        self.model: Any = importlib.import_module("runtime.serve.triton_backend").Model()
        self.model.load(BUNDLE, json.loads(args["model_config"]))

    def execute(self, requests: list[Any]) -> None:
        """Accept requests; the model is decoupled, so responses follow later."""
        self.model.execute(requests)

    def finalize(self) -> None:
        """Unload."""
        self.model.finalize()
