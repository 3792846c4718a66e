"""What building a bundle takes on the build host, step by step: memory, disk and time.

Arithmetic on a `Build`; opens no file. GB is 10^9 bytes. Memory is anonymous memory, which has no
file behind it. A checkpoint's weights stay mapped and are not in it: `mapped_bytes` is what the
page cache should hold, and where it cannot, every pass over the weights reads them from the disk.

Sizes were measured with `python -m benchmarks.export`, rates on a shared machine: 2 EPYC cores,
24 GiB (torch 2.13.0, onnxruntime 1.31.1, tensorrt-rtx 1.7.1). See docs/benchmarks.md.
"""

from dataclasses import dataclass
from math import prod

from exporter.checks.reference_pass import COMPARED
from exporter.checks.texts import cases, gate_text
from exporter.decide import NOTHING_KNOWN
from exporter.decoder.load import KEPT_WEIGHTS
from exporter.quantization.policy import WeightFacts
from graphs.build import Build
from graphs.dtypes import FLOATS, item_size
from graphs.spec import ModelSpec
from runtime.bundle.sizes import weight_bytes

TRACE, REFERENCE, COMPILE = (
    "Tracing the decoder and writing weights", "Running the reference", "Building the engine",
)  # fmt: skip
LOAD, VERIFY, GATE, HASH = (
    "Loading the bundle", "Verifying", "Measuring perplexity", "Hashing the bundle",
)  # fmt: skip
"""Names of the steps, as `export` shows them while they run."""

CORES = 2  # that the rates below are multiplied by
STORED_BYTES = 2  # of the checkpoint's weights
GOLDEN_TOKENS = 24  # two texts of 12
OTHER_FILES = 16_000_000  # bytes beside the weights: graph, tokenizer, run.pyz, report

# Memory, in bytes.
PROCESS = 350_000_000  # Python, torch and the exporter's libraries, with a traced graph
TRACED_LAYER = 2_000_000  # more graph for each layer: 0.35 GB for 4, 0.41 GB for 32
ROUNDING = 60_000_000  # temporary copies while weights are rounded
DECODING = 1.5  # copies of a GGUF file's largest weight in float32 while it is decoded
BLOCKS, KEPT_BLOCKS = 420_000_000, 50_000_000
"""What the reference leaves in the heap, which keeps it for what follows: of a model whose weights
it reads anew for every pass (0.30 to 0.55 GB for Mistral-7B), and of one whose weights it keeps."""
PLAN_COPIES, PLAN_PROCESS = 1.14, 200_000_000
"""Bytes per weight byte, and bytes beside them, while TensorRT-RTX 1.7 streams a plan: 2.65 GB for
a plan of 2.27 GB, 16.52 GB for one of 14.49 GB (bf16), 8.02 GB for one of 7.41 GB (int8wo)."""
UNPACKED = 0.55
"""Bytes more for each 4-bit weight: 1.57 GB for a plan of 0.85 GB, 8.63 GB for one of 4.01 GB."""
UNPACKED_APART = 0.43
"""And if single tokens have a profile of their own: 11.64 GB for the same plan of 4.03 GB."""
SESSION_COPIES, SESSION_COPIES_FLOAT = 1.0, 1.12
"""ONNX Runtime CPU's bytes per weight byte: 5.1 GB for Mistral-7B's 5.14 GB in int4wo; in float32
1.09 GB more for 0.97 GB more weights (8 and 24 layers of width 1024)."""
RUNNING = 200_000_000  # its buffers during steps of 80 to 256 tokens of a 7B

# Time.
TRACE_SECONDS, TRACE_SECONDS_PER_LAYER = 3.5, 0.43  # SmolLM2's 30 layers take 16 s
DISK_RATE = 0.8e9  # bytes/s, read or written: a 7B in bf16 is copied in 36 s
WRITE_RATE = 0.1e9  # weights/s and core, rounded and packed beside tracing
ROUND_RATE = 0.17e9  # weights/s and core, to codes and back
CONVERT_RATE = 0.57e9  # weights/s and core, bf16 to float32
REFERENCE_SECONDS, GATE_SECONDS = 1.0, 4.5  # tokenizer, texts and operators of a small model
REFERENCE_RATE = 50e9  # operations/s and core of the reference, 24 to 170 tokens of a 7B
WINDOW_RATE = 80e9  # likewise, 511 tokens
SESSION_RATE = 105e9  # operations/s and core of ONNX Runtime CPU, 122 and 511 tokens of a 7B
LOAD_RATE = 0.95e9  # bytes/s: ONNX Runtime CPU reads and packs the weights of a 7B in 6 to 8 s
HASH_RATE = 1.1e9  # bytes/s and core
COMPILE_SECONDS = 6.0
PLAN_RATE, PLAN_RATE_APART = 0.34e9, 0.21e9
"""Bytes/s of a plan, with one profile and with two: a 7B in bf16 takes 49 and 82 s."""
NARROW_RATE = 0.19e9  # 4-bit weights/s and profile: a 7B in int4wo takes 103 s with two


@dataclass(frozen=True, slots=True, kw_only=True)
class HostStep:
    """One step: its name, how long it takes, and the peak of anonymous memory meanwhile.

    `in_child` says that the memory is that of a process of its own.
    """

    name: str
    seconds: float
    memory_bytes: int
    in_child: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class HostNeeds:
    """What the build host must have. `disk_bytes` is the most that is needed at any time.

    `mapped_bytes` are those of the checkpoint, of which `passes` are made.
    """

    steps: tuple[HostStep, ...]
    disk_bytes: int
    bundle_bytes: int
    mapped_bytes: int
    passes: int

    @property
    def largest(self) -> HostStep:
        """The step that needs the most memory."""
        return max(self.steps, key=lambda step: step.memory_bytes)

    @property
    def memory_bytes(self) -> int:
        """The largest peak of any step."""
        return self.largest.memory_bytes

    @property
    def seconds(self) -> float:
        """All steps, one after another."""
        return sum(step.seconds for step in self.steps)


def host_needs(build: Build, facts: WeightFacts = NOTHING_KNOWN) -> HostNeeds:
    """Work out what building takes. A checkpoint of unknown types is taken for 2 bytes a weight."""
    weights = sum(weight_bytes(build.spec, build.storage, build.activation).values())
    steps = [_trace(build, facts, weights), _reference(build, facts)]
    if build.target.holds_plan:
        steps.append(_compile(build, weights))
    gated = build.target.verified_at_export and build.precision.quantized
    if build.target.verified_at_export:
        steps += _verify(build, weights)
    if gated:
        steps.append(_gate(build, facts, weights))
    hashed = 0 if build.target.holds_plan else weights  # a plan is hashed while it is written
    left = _process(build.spec) + _blocks(build.spec)
    steps.append(HostStep(name=HASH, seconds=hashed / HASH_RATE, memory_bytes=left))
    return HostNeeds(
        steps=tuple(steps),
        # An engine is built from a weights file that lies beside it until the plan is complete.
        disk_bytes=(2 if build.target.holds_plan else 1) * weights + OTHER_FILES,
        bundle_bytes=weights + OTHER_FILES,
        mapped_bytes=STORED_BYTES * build.spec.num_parameters,
        passes=2 + gated,
    )


def _trace(build: Build, facts: WeightFacts, weights: int) -> HostStep:
    """Tracing beside writing: they share the cores, and the disk is waited for meanwhile."""
    spec = build.spec
    tracing = TRACE_SECONDS + TRACE_SECONDS_PER_LAYER * spec.num_hidden_layers
    rounding = spec.num_parameters / WRITE_RATE if build.precision.quantized else 0
    hashing = STORED_BYTES * spec.num_parameters / HASH_RATE
    disk = (STORED_BYTES * spec.num_parameters + weights) / DISK_RATE
    rounded = ROUNDING if build.precision.quantized else 0
    return HostStep(
        name=TRACE,
        seconds=max(tracing + (rounding + hashing) / CORES, disk),
        memory_bytes=_process(spec) + rounded + _decoded_at_once(spec, facts),
    )


def _reference(build: Build, facts: WeightFacts) -> HostStep:
    """One pass over the weights with the golden texts and the verification's cases."""
    spec = build.spec
    chosen = cases(build, short=True) if build.target.verified_at_export else []
    tokens = GOLDEN_TOKENS + sum(case.tokens for case in chosen)
    logits = (GOLDEN_TOKENS + sum(min(case.tokens, COMPARED) for case in chosen)) * spec.vocab_size
    converting = ROUND_RATE if build.precision.quantized else CONVERT_RATE
    kept = 0
    if _is_kept(spec, facts):
        shapes = spec.weight_shapes()
        kept = sum(prod(shapes[name]) for name in shapes.keys() - set(build.storage.copied))
    return HostStep(
        name=REFERENCE,
        seconds=REFERENCE_SECONDS
        + _multiply(spec, tokens, REFERENCE_RATE)
        + spec.num_parameters / converting / CORES,
        memory_bytes=_process(spec) + _blocks(spec) + _decoded_at_once(spec, facts)
        + (kept + logits) * item_size("float32"),
    )  # fmt: skip


def _compile(build: Build, weights: int) -> HostStep:
    """TensorRT in a process of its own."""
    shapes, schemes = build.spec.weight_shapes(), build.storage.schemes
    narrow = sum(prod(shapes[name]) for name, scheme in schemes.items() if scheme.codes == "int4")
    profiles, rate = (2, PLAN_RATE_APART) if build.decodes_apart else (1, PLAN_RATE)
    unpacked = UNPACKED + (UNPACKED_APART if build.decodes_apart else 0)
    return HostStep(
        name=COMPILE,
        seconds=profiles * (COMPILE_SECONDS + narrow / NARROW_RATE) + weights / rate,
        memory_bytes=round(PLAN_COPIES * weights + unpacked * narrow) + PLAN_PROCESS,
        in_child=True,
    )


def _verify(build: Build, weights: int) -> list[HostStep]:
    """Loading the bundle, and running the cases on it."""
    chosen = cases(build, short=True)
    memory = _session(build, weights)
    return [
        HostStep(name=LOAD, seconds=weights / LOAD_RATE, memory_bytes=memory),
        HostStep(
            name=VERIFY,
            seconds=_multiply(build.spec, sum(case.tokens for case in chosen), SESSION_RATE),
            memory_bytes=memory + RUNNING,
        ),
    ]


def _gate(build: Build, facts: WeightFacts, weights: int) -> HostStep:
    """The same windows on the reference and on the bundle."""
    spec, read = build.spec, gate_text(build)
    kept = spec.num_parameters if _is_kept(spec, facts) else 0
    logits = read.length * spec.vocab_size
    seconds = GATE_SECONDS + read.windows * spec.num_parameters / CONVERT_RATE / CORES
    seconds += _multiply(spec, read.tokens, WINDOW_RATE)
    seconds += _multiply(spec, read.tokens, SESSION_RATE)
    return HostStep(
        name=GATE,
        seconds=seconds,
        memory_bytes=_session(build, weights)
        + RUNNING
        + _blocks(spec)
        + (kept + logits) * item_size("float32"),
    )


def _process(spec: ModelSpec) -> int:
    """Bytes of the exporter's own process once it has traced the decoder."""
    return PROCESS + TRACED_LAYER * spec.num_hidden_layers


def _session(build: Build, weights: int) -> int:
    """Bytes with the bundle loaded."""
    spec = build.spec
    tied = spec.vocab_size * spec.hidden_size if spec.tie_word_embeddings else 0  # packed again
    packed = tied * item_size(build.activation)
    copies = SESSION_COPIES if build.precision.quantized else SESSION_COPIES_FLOAT
    return _process(spec) + _blocks(spec) + round(copies * weights) + packed


def _blocks(spec: ModelSpec) -> int:
    """Bytes that the reference leaves in the heap."""
    return BLOCKS if spec.num_parameters > KEPT_WEIGHTS else KEPT_BLOCKS


def _is_decoded(facts: WeightFacts) -> bool:
    """Whether weights are decoded to float32, as a GGUF file's blocks are."""
    return bool(facts.types - set(FLOATS))


def _is_kept(spec: ModelSpec, facts: WeightFacts) -> bool:
    """Whether the reference keeps decoded weights in memory."""
    return _is_decoded(facts) and spec.num_parameters <= KEPT_WEIGHTS


def _decoded_at_once(spec: ModelSpec, facts: WeightFacts) -> int:
    """Bytes of the largest weight while it is decoded."""
    largest = max(prod(shape) for shape in spec.weight_shapes().values())
    return round(DECODING * largest) * item_size("float32") if _is_decoded(facts) else 0


def _multiply(spec: ModelSpec, tokens: int, rate: float) -> float:
    """Seconds for the products of all weights with `tokens` inputs."""
    return 2 * spec.num_parameters * tokens / rate / CORES
