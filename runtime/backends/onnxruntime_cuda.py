"""A session on ONNX Runtime CUDA, with the ring updated in place. Knows nothing about text.

The ring, the inputs and the logits are in memory that is allocated here and bound by address.
`past_*` and `present_*` share an address, and a decode step's addresses never change, so ONNX
Runtime can capture it as a CUDA graph. Logits are copied to the host here as well, because ONNX
Runtime's Python values cannot be read as bfloat16.

`GroupQueryAttention` takes several tokens after others in one row only ("batch_size must be 1 when
sequence_length > 1 and past context is given", ONNX Runtime 1.31). If the graph has it, a prompt
with several rows runs row by row, each on its own part of the ring.
"""

from collections.abc import Collection, Mapping
from contextlib import ExitStack, redirect_stdout
from io import StringIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import onnxruntime as ort

from graphs.attention_form import attention_forms
from graphs.contract import GraphContract, TensorSpec
from graphs.dtypes import ELEMENT_TYPES
from graphs.errors import MistralcError
from graphs.targets import AttentionForm, Target
from runtime.backends.cuda_device import Gpu
from runtime.backends.device_buffers import StepBuffers
from runtime.backends.nvidia_libraries import load_nvidia_libraries
from runtime.backends.session import Caches, Ids, Logits, Slots
from runtime.backends.step_bounds import check_capacities, check_step

PROVIDER = "CUDAExecutionProvider"
# The provider's memory as ONNX Runtime's bindings name it: "CUDA" in lower case.
DEVICE = PROVIDER.removesuffix("ExecutionProvider").lower()
GRAPH, NO_GRAPH = "1", "-1"  # `gpu_graph_id`: the decode step's graph, and none
FLASH, UNFUSED = 1, 16  # bits of the provider's option `sdpa_kernel`

Step = tuple[Ids, Ids, Ids]  # tokens, positions and indices of logits


class CudaOrtSession:
    """`model.onnx` loaded on ONNX Runtime's CUDA provider with a full ring of `batch` rows.

    `captured` says whether decoding is a CUDA graph. ONNX Runtime does not capture a model of which
    it places some nodes on the CPU.
    """

    def __init__(
        self, model: Path, contract: GraphContract, target: Target, *, batch: int = 1
    ) -> None:
        self.partial = False  # a captured graph has the shapes of all rows
        self.spec, self.ring, self.contract = contract.spec, contract.ring, contract
        self.batch = batch
        _require_provider(target)
        forms = frozenset(attention_forms(target, contract).values())
        self._gpu = Gpu(target.name)
        with ExitStack() as undo:
            undo.callback(self.close)
            self._session: Any
            self._session, self.captured = _open(model, forms)
            self._buffers = StepBuffers(self._gpu, contract, batch)
            self._decode = self._binding()
            self._bind_step(self._decode, batch, 1, 1)
            # For prompts: one binding of all rows, or one of each row.
            apart = batch > 1 and "grouped" in forms
            self._prefill = [self._binding(row) for row in (range(batch) if apart else [None])]
            self._options = {graph: _options(graph) for graph in (GRAPH, NO_GRAPH)}
            undo.pop_all()

    def resize(self, capacities: Mapping[int | None, int]) -> None:
        """Check the capacities, by window: this ring is full from the start and never resized."""
        check_capacities(self.spec, self.ring, capacities)

    def step(
        self, input_ids: Ids, position_ids: Ids, logits_indices: Ids, first: int = 0
    ) -> Logits:
        """Write tokens [B, S] at positions [B, S]; returns the logits [B, T, V] at the indices.

        All rows take part, so `first` must be 0. The result is the session's own buffer, valid
        until the next step. Raises MistralcError before anything is written if the step does not
        fit into the ring.
        """
        if self._session is None:
            raise MistralcError("This session was closed. Load the bundle again.")
        check_step(self.spec, self.ring, self.batch, input_ids, position_ids, logits_indices, first)
        step = input_ids, position_ids, logits_indices
        wanted = logits_indices.shape[1]
        if input_ids.shape[1] == 1 and wanted == 1:
            self._run(self._decode, GRAPH, step)
        elif len(self._prefill) == 1:
            self._read(self._prefill[0], step)
        else:
            for row, binding in enumerate(self._prefill):
                ids, positions, indices = (part[row : row + 1] for part in step)
                self._read(binding, (ids, positions, indices), row)
        return self._buffers.result(wanted)

    def read_row(self, row: int, slots: Slots) -> Caches:
        """Copy these slots of one row out of the ring; half precision comes as uint16 bits."""
        return self._buffers.read_row(row, slots)

    def write_row(self, row: int, slots: Slots, caches: Caches) -> None:
        """Write what `read_row` returned for as many slots; other rows are not touched."""
        self._buffers.write_row(row, slots, caches)

    def close(self) -> None:
        """Free all memory; may be called twice."""
        self._prefill = []
        self._decode = self._session = None
        self._gpu.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _read(self, binding: Any, step: Step, row: int | None = None) -> None:
        """Run a step of several tokens on one of the bindings for prompts."""
        rows, tokens = step[0].shape
        self._bind_step(binding, rows, tokens, step[2].shape[1])
        self._run(binding, NO_GRAPH, step, row)

    def _run(self, binding: Any, graph: str, step: Step, row: int | None = None) -> None:
        """Copy a step in, run a binding, copy the logits out; returns when that has finished.

        `row` is given if the step and the binding are of that row alone.
        """
        self._buffers.write(*step)
        self._buffers.copy_in()
        self._gpu.wait()  # ONNX Runtime runs in its own stream
        try:
            self._session.run_with_iobinding(binding, self._options[graph])
        except Exception as error:
            free, total = self._gpu.free()
            raise MistralcError(
                f"ONNX Runtime {ort.__version__} could not run a step, with {free:,} of {total:,} "
                f"bytes of the GPU free: {error}. If memory ran out, free some, or export with a "
                "smaller --chunk, --window or --max-batch; else report this with the GPU."
            ) from error
        self._buffers.copy_out(step[2].shape[1], row)
        self._gpu.wait()

    def _binding(self, row: int | None = None) -> Any:
        """A new binding with the ring bound: of all rows, or of one."""
        binding = self._session.io_binding()
        for tensor in (*self.contract.inputs, *self.contract.outputs):
            if tensor.name.startswith(("past_", "present_")):
                past = tensor.name.startswith("past_")
                bind = binding.bind_input if past else binding.bind_output
                rows, *rest = self._buffers.shapes[tensor.name]
                if row is None:
                    self._bind(bind, tensor, (rows, *rest))
                else:
                    address = self._buffers.row_address(tensor.name, row)
                    self._bind(bind, tensor, (1, *rest), address)
        return binding

    def _bind_step(self, binding: Any, rows: int, tokens: int, wanted: int) -> None:
        sizes = self.contract.sizes(batch=rows, tokens=tokens, wanted=wanted)
        for tensor in self.contract.inputs:
            if not tensor.name.startswith("past_"):
                self._bind(binding.bind_input, tensor, tensor.sized(sizes))
        logits = self.contract.outputs[0]
        address = self._buffers.logits(wanted).device
        self._bind(binding.bind_output, logits, logits.sized(sizes), address)

    def _bind(
        self, bind: Any, tensor: TensorSpec, shape: tuple[int, ...], address: int | None = None
    ) -> None:
        if address is None:
            address = self._buffers.addresses[tensor.name]
        bind(tensor.name, DEVICE, 0, ELEMENT_TYPES[tensor.dtype].onnx, shape, address)


def _require_provider(target: Target) -> None:
    """Raise MistralcError unless the installed ONNX Runtime has the CUDA provider."""
    if PROVIDER not in ort.get_available_providers():
        raise MistralcError(
            f"This bundle was built for the target {target.name}, and the installed ONNX Runtime "
            f"{ort.__version__} has no {PROVIDER} (it has "
            f"{', '.join(ort.get_available_providers())}). The packages onnxruntime and "
            "onnxruntime-gpu exclude each other: pip uninstall onnxruntime, then "
            f"pip install 'mistralc[{target.name}]'."
        )


def _open(model: Path, forms: Collection[AttentionForm]) -> tuple[Any, bool]:
    """Load `model`; returns the session, and whether ONNX Runtime accepted CUDA graphs.

    Raises MistralcError if ONNX Runtime fell back to the CPU, of which it only warns.
    """
    with redirect_stdout(StringIO()):  # it prints what it did not find; the check below reports it
        load_nvidia_libraries(_cuda_version().partition(".")[0])
        ort.preload_dlls()  # those that are not in Python packages
    session, captured = None, True
    for captured in (True, False):
        try:
            options = providers(forms, graphs=captured)
            session = ort.InferenceSession(model, ort.SessionOptions(), options)
            break
        except Exception as error:
            # A model with a node on the CPU cannot be captured, but it can run.
            if not captured or "graph capture" not in str(error):
                raise _not_loaded(model, error) from error
    if session is None or PROVIDER not in session.get_providers():
        raise MistralcError(
            f"ONNX Runtime {ort.__version__} could not start its {PROVIDER} and fell back to the "
            f"CPU, for which this bundle was not built. It needs CUDA {_cuda_version()} and cuDNN "
            "9: pip install 'onnxruntime-gpu[cuda,cudnn]' brings both. Its own warning above names "
            "the library that is missing."
        )
    return session, captured


def _options(graph: str) -> Any:
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", graph)
    return options


def providers(
    forms: Collection[AttentionForm], *, graphs: bool
) -> list[tuple[str, dict[str, str]]]:
    """ONNX Runtime's providers and their options, for a graph with these forms of attention.

    Memory is not rounded up to powers of two.
    """
    options = {
        "device_id": "0",
        "arena_extend_strategy": "kSameAsRequested",
        "enable_cuda_graph": "1" if graphs else "0",
    }
    if "unfused" in forms:
        # Flash attention stays allowed for `GroupQueryAttention`; it takes no mask.
        options["sdpa_kernel"] = str(UNFUSED | (FLASH if "grouped" in forms else 0))
    return [(PROVIDER, options)]


def _cuda_version() -> str:
    """The version of CUDA that ONNX Runtime was built for."""
    return getattr(ort, "cuda_version", "") or "13"


def _not_loaded(model: Path, error: Exception) -> MistralcError:
    return MistralcError(
        f"ONNX Runtime {ort.__version__} could not load {model} on CUDA: {error}. If memory ran "
        "out, take a larger GPU or export with a smaller --precision; else export the bundle again "
        "with this version of mistralc, or install the version of ONNX Runtime in its manifest."
    )
