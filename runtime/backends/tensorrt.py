"""A session on TensorRT or TensorRT-RTX, with the ring updated in place. Knows nothing about text.

Every cache is one allocation bound as both `past_*` and `present_*`. Two execution contexts share
the weights. One decodes single tokens, with shapes and addresses that never change; the other
reads prompts. Decoding is one CUDA graph: TensorRT-RTX captures its own, and TensorRT is captured
here together with the copies to and from the host.
"""

import mmap
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from graphs.contract import STEP_INPUTS, GraphContract
from graphs.errors import MistralcError
from graphs.targets import Target
from runtime.backends import kernel_cache, tensorrt_library
from runtime.backends.cuda_device import Gpu, out_of_memory
from runtime.backends.device_buffers import StepBuffers
from runtime.backends.plan_contract import Profiles, check_plan
from runtime.backends.plan_validity import COPY, DRIVER, MEMORY, REBUILD, validity
from runtime.backends.session import Caches, Ids, Logits, Slots
from runtime.backends.step_bounds import check_capacities, check_step
from runtime.backends.tensorrt_library import last_errors, log_of

_REMEDY: Mapping[str, str] = {
    REBUILD: "Export the checkpoint again, for this GPU and with this version of TensorRT, or "
    "install the version that built the plan.",
    DRIVER: "Update the NVIDIA driver.",
    MEMORY: "Free some of the GPU's memory, or use a larger GPU.",
    COPY: "Copy the bundle again from where it was built.",
}


class Scratch(NamedTuple):
    """Device memory for the activations of one step."""

    address: int
    nbytes: int


class TrtSession:
    """`engine.plan` loaded on the first GPU with a full ring of `batch` rows.

    `cache` is the file for the kernels that TensorRT-RTX compiles (`kernel_cache.kernels_file`).
    `weight_budget` is the number of bytes of weights that stay on the GPU, for a plan built with
    weight streaming; None keeps as many as fit. `captured` says whether decoding is a CUDA graph.
    With `shared`, the engine is that session's (`with_rows`).
    """

    def __init__(
        self,
        plan: Path,
        contract: GraphContract,
        target: Target,
        *,
        batch: int = 1,
        cache: Path | None = None,
        weight_budget: int | None = None,
        shared: "TrtSession | None" = None,
    ) -> None:
        self.partial = False  # shapes and addresses are those of all rows
        self.spec, self.ring, self.batch, self.target = contract.spec, contract.ring, batch, target
        self._trt = tensorrt_library.load(target)
        self._log = log_of(target)
        self._log.errors.clear()
        self._cache = cache
        self._kernels: Any = None if shared is None else shared._kernels
        self._plan, self._contract = plan, contract
        self._decode: Any = None
        self._prefill: Any = None
        self._graph: Any = None
        self._owned: list[Any] = []  # what the contexts need alive, in order of creation
        self._streams = self.captured = False
        self._gpu = Gpu(target.name)
        with ExitStack() as undo:
            undo.callback(self._release)
            if shared is None:
                engine = self._load(plan, contract.ring_bytes)
            else:
                self._owned += shared._owned[:2]  # the runtime and the engine
                engine = self._owned[1]
            profiles = check_plan(self._trt, engine, contract, batch)
            self._buffers = StepBuffers(self._gpu, contract, batch)
            if shared is None:
                self._set_budget(engine, weight_budget)
            else:
                self._streams = shared._streams
            scratch = self._scratch(engine, profiles)
            self._decode = self._context(engine, profiles.decode, scratch, decode=True)
            self._prefill = self._context(engine, profiles.prefill, scratch, decode=False)
            self._warm_up()
            undo.pop_all()

    def with_rows(self, batch: int) -> "TrtSession":
        """A session with a ring of `batch` rows of its own that shares this one's weights."""
        return TrtSession(
            self._plan, self._contract, self.target, batch=batch, cache=self._cache, shared=self
        )

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
        if self._decode is None:
            raise MistralcError("This session was closed. Load the bundle again.")
        check_step(self.spec, self.ring, self.batch, input_ids, position_ids, logits_indices, first)
        self._buffers.write(input_ids, position_ids, logits_indices)
        tokens, wanted = input_ids.shape[1], logits_indices.shape[1]
        if tokens != 1 or wanted != 1:
            self._shape(self._prefill, tokens, wanted)
            self._enqueue(self._prefill, wanted)
        elif self._graph is not None:
            self._gpu.launch(self._graph)
        else:
            self._enqueue(self._decode, 1)
        self._gpu.wait()
        return self._buffers.result(wanted)

    def read_row(self, row: int, slots: Slots) -> Caches:
        """Copy these slots of one row out of the ring; half precision comes as uint16 bits."""
        return self._buffers.read_row(row, slots)

    def write_row(self, row: int, slots: Slots, caches: Caches) -> None:
        """Write what `read_row` returned for as many slots; other rows are not touched."""
        self._buffers.write_row(row, slots, caches)

    def close(self) -> None:
        """Save the compiled kernels and free all memory; may be called twice."""
        if self._decode is not None:
            self._save_kernels()
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _release(self) -> None:
        if self._owned:
            with suppress(MistralcError):  # an interrupted step may still be running
                self._gpu.wait()
        self._graph = self._decode = self._prefill = self._kernels = None
        while self._owned:  # the contexts' settings, the engine, the runtime: newest first
            self._owned.pop()
        self._gpu.close()

    def _load(self, plan: Path, ring_bytes: int) -> Any:
        """Deserialize the plan from the page cache, so that the host never holds a copy."""
        runtime = self._trt.Runtime(self._log)
        nbytes = plan.stat().st_size if plan.is_file() else 0
        if nbytes == 0:
            raise MistralcError(
                f"{plan} is missing or empty; a TensorRT plan is expected. Copy the bundle again "
                "from where it was built."
            )
        with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            engine = runtime.deserialize_cuda_engine(view)
        if engine is None:
            free, total = self._gpu.free()
            if free < nbytes:
                raise out_of_memory("the weights and the ring", nbytes + ring_bytes, free, total)
            raise _not_loaded(plan, self._trt, self._log)
        self._owned += [runtime, engine]
        return engine

    def _set_budget(self, engine: Any, budget: int | None) -> None:
        """Set how many bytes of weights stay on the GPU.

        The automatic budget depends on free memory, so the ring must be allocated before. TensorRT
        takes the budget only as long as there is no context.
        """
        streamable = int(engine.streamable_weights_size)
        if streamable == 0:
            if budget is not None:
                raise MistralcError(
                    f"A budget of {budget:,} bytes for weights was given, but this plan keeps all "
                    "its weights on the GPU. Export the checkpoint again with --weight-streaming, "
                    "or omit the budget."
                )
            return
        if budget is None:
            budget = int(engine.get_weight_streaming_automatic_budget())
        engine.weight_streaming_budget_v2 = min(budget, streamable)
        self._streams = budget < streamable

    def _scratch(self, engine: Any, profiles: Profiles) -> Scratch:
        """Allocate the activations of a step, once for both contexts: only one step runs."""
        size = engine.get_device_memory_size_for_profile_v2  # asks for the weight budget, too
        nbytes = max(int(size(profile)) for profile in profiles)
        return Scratch(self._gpu.allocate(max(nbytes, 1), "a step's activations"), nbytes)

    def _context(self, engine: Any, profile: int, scratch: Scratch, *, decode: bool) -> Any:
        """Make an execution context and bind everything that does not change between steps."""
        if self.target.compiles_kernels_at_load:
            config = self._config(engine, decode=decode)
            context = engine.create_execution_context(config)
            self._owned.append(config)
        else:
            strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
            context = engine.create_execution_context(strategy)
        if context is None:
            raise self._failed("make room for a step")
        context.set_device_memory(scratch.address, scratch.nbytes)
        if profile != 0:
            self._require(context.set_optimization_profile_async(profile, self._gpu.stream))
            self._gpu.wait()
        for name, address in self._buffers.addresses.items():
            self._require(context.set_tensor_address(name, address), name)
            if name.startswith("past_"):
                self._require(context.set_input_shape(name, self._buffers.shapes[name]), name)
        self._shape(context, 1, 1)
        return context

    def _config(self, engine: Any, *, decode: bool) -> Any:
        """TensorRT-RTX's settings of a context.

        A decode step has one shape: its kernels are compiled at once and captured. Prompts have
        many shapes: their kernels are compiled in the background when they first occur.
        """
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(
            self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        graphs, kernels = (
            self._trt.CudaGraphStrategy,
            self._trt.DynamicShapesKernelSpecializationStrategy,
        )
        capture = decode and not self._streams  # streamed weights cannot be captured
        config.cuda_graph_strategy = graphs.WHOLE_GRAPH_CAPTURE if capture else graphs.DISABLED
        config.dynamic_shapes_kernel_specialization_strategy = (
            kernels.EAGER if decode else kernels.LAZY
        )
        if self._cache is not None:
            if self._kernels is None:
                self._kernels = config.create_runtime_cache()
                known = kernel_cache.read(self._cache)
                if known is not None:
                    # Returns False for another GPU's kernels; the cache then starts empty.
                    self._kernels.deserialize(known)
                self._owned.append(self._kernels)
            config.set_runtime_cache(self._kernels)
        return config

    def _shape(self, context: Any, tokens: int, wanted: int) -> None:
        """Set the shapes of this step's inputs and the address of its logits."""
        for name in STEP_INPUTS:
            count = wanted if name == "logits_indices" else tokens
            self._require(context.set_input_shape(name, (self.batch, count)), name)
        address = self._buffers.logits(wanted).device
        self._require(context.set_tensor_address("logits", address), "logits")

    def _enqueue(self, context: Any, wanted: int) -> None:
        """Enqueue a whole step: copy the inputs in, run, copy the logits out."""
        self._buffers.copy_in()
        if not context.execute_async_v3(self._gpu.stream):
            raise self._failed("run a step")
        self._buffers.copy_out(wanted)

    def _warm_up(self) -> None:
        """Decode one token twice to compile and capture everything, then empty the ring.

        TensorRT can capture a shape only after it has run once.
        """
        zero = np.zeros((self.batch, 1), np.int64)
        self._buffers.write(zero, zero, zero)
        for _ in range(2):
            self._enqueue(self._decode, 1)
            self._gpu.wait()
        if self.target.compiles_kernels_at_load:
            self.captured = not self._streams
        else:
            self._graph = self._gpu.capture(lambda: self._enqueue(self._decode, 1))
            self.captured = self._graph is not None
        self._buffers.clear_ring()
        self._gpu.wait()
        self._save_kernels()

    def _save_kernels(self) -> None:
        if self._kernels is None or self._cache is None:
            return
        blob = self._kernels.serialize()
        kernels = bytes(blob) if blob is not None else b""
        if kernels and kernels != kernel_cache.read(self._cache):
            kernel_cache.write(self._cache, kernels)

    def _require(self, accepted: bool, name: str = "") -> None:
        if not accepted:
            raise self._failed(f"accept the shape or address of {name or 'a profile'}")

    def _failed(self, doing: str) -> MistralcError:
        errors = last_errors(self._log)
        if "memory" in errors.lower():
            free, total = self._gpu.free()
            return MistralcError(
                f"TensorRT could not {doing}, with {free:,} of {total:,} bytes of the GPU free: "
                f"{errors}. nvidia-smi shows what else is using it. Free some, use a larger GPU, "
                "or export with a smaller --chunk, --window or --max-batch."
            )
        return MistralcError(
            f"TensorRT could not {doing}: {errors}. Update the driver, or report this with the GPU "
            f"and the version of {self.target.distributions[0]}."
        )


def _not_loaded(plan: Path, trt: Any, log: Any) -> MistralcError:
    """The error for a refused plan: TensorRT's verdict on its header, else its logged errors."""
    verdict = validity(plan, trt.__name__)
    why = " and ".join(verdict.reasons) or last_errors(log)
    remedy = " ".join(_REMEDY[kind] for kind in verdict.remedies or (COPY,))
    return MistralcError(
        f"TensorRT {trt.__version__} could not load {plan} ({plan.stat().st_size:,} bytes): {why}. "
        f"{remedy} `mistralc doctor` checks the bundle and this host."
    )
