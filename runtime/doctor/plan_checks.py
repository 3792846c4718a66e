"""Check that this host can run a TensorRT plan: version, GPU, driver, and TensorRT's own check.

Takes a plan's path and what was recorded when it was built; knows no manifest.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from graphs.targets import DEFAULT_TARGET, TARGETS, Target
from runtime.backends.plan_validity import COPY, DRIVER, MEMORY, REBUILD, validity
from runtime.doctor.finding import Check, failed, ok, warning
from runtime.system.host import Cuda, Library, release

MIN_DRIVER = {13: "580", 12: "525"}  # by CUDA major version, from CUDA's release notes


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """A plan and what was recorded when it was built.

    `version` is that of TensorRT, None if it was not recorded. The plan was built for GPUs of
    `compute_capabilities`, such as "8.9"; if that is empty, for all that its TensorRT supports.
    """

    plan: Path
    target: Target
    version: str | None
    compute_capabilities: tuple[str, ...] = ()


def check_engine(engine: Engine, library: Library, cuda: Cuda, rebuild: str) -> list[Check]:
    """Check a plan against the installed TensorRT and the first GPU.

    `rebuild` is the command that exports the bundle again. Without the library, only the GPU can
    be checked.
    """
    checks = [check_gpu(engine, cuda, rebuild)]
    if library.version is None or library.problem is not None:
        return checks
    return [
        check_version(engine, library, rebuild),
        *checks,
        *check_driver(library, cuda),
        check_plan(engine, cuda, rebuild),
    ]


def check_version(engine: Engine, library: Library, rebuild: str) -> Check:
    """Check that the installed TensorRT is the version that built the plan."""
    name, installed = "TensorRT version", f"{library.distribution} {library.version}"
    if engine.version is None:
        return warning(
            name, f"{installed}; the manifest does not record which version built the plan", rebuild
        )
    if release(engine.version) == release(str(library.version)):
        return ok(name, f"{installed}, which also built the plan")
    return failed(
        name,
        f"TensorRT {engine.version} built the plan, but {installed} is installed; a plan runs only "
        "on the version that built it",
        f"pip install {library.distribution}=={engine.version}    or: {rebuild}",
    )


def check_gpu(engine: Engine, cuda: Cuda, rebuild: str) -> Check:
    """Check that the plan was built for the first GPU's compute capability."""
    name = "GPU of the plan"
    wanted = engine.compute_capabilities
    if not wanted:
        wanted = engine.target.compute_capabilities or ()
    kinds = f"a GPU of compute capability {' or '.join(wanted)}" if wanted else "an NVIDIA GPU"
    if not cuda.devices:
        here = TARGETS[DEFAULT_TARGET]
        options = f"--target {here.name} --precision {here.default_precision}"
        elsewhere = re.sub(r"--target \w+ --precision \w+", options, rebuild)
        return failed(
            name,
            f"{cuda.problem}, and the plan needs {kinds}",
            f"Run it on a host with such a GPU, or export it for this host: {elsewhere}",
        )
    device = cuda.devices[0]
    capability = device.compute_capability
    found = f"{device.name}, compute capability {capability}"
    target = engine.target
    if not target.supports(capability):
        remedy = rebuild.replace(f"--target {target.name}", f"--target {target.alternative}")
        return failed(name, f"{found}, which {target.title} does not support", remedy)
    if wanted and not any(_matches(capability, each) for each in wanted):
        return failed(name, f"{found}; the plan was built for {', '.join(wanted)}", rebuild)
    return ok(name, found)


def check_driver(library: Library, cuda: Cuda) -> list[Check]:
    """Check that the driver supports the CUDA version that the TensorRT package needs."""
    made_for = re.search(r"cu(\d\d)\b", library.distribution or "")
    if made_for is None or cuda.version is None:
        return []
    needed, newest = int(made_for[1]), ".".join(map(str, cuda.version))
    if cuda.version[0] >= needed:
        return [ok("driver of the plan", f"CUDA {newest}; {library.distribution} needs {needed}")]
    return [
        failed(
            "driver of the plan",
            f"the driver supports CUDA up to {newest}; {library.distribution} needs CUDA {needed}",
            _update(needed),
        )
    ]


def check_plan(engine: Engine, cuda: Cuda, rebuild: str) -> Check:
    """Ask TensorRT whether the plan can run here."""
    name = f"plan {engine.plan.name}"
    try:
        answer = validity(engine.plan, engine.target.backend_module)
    except OSError as error:
        return failed(name, f"it could not be read ({error})", rebuild)
    if answer.verdict == "VALID":
        return ok(name, "TensorRT finds it valid for this host")
    if answer.verdict == "UNKNOWN":
        return ok(name, "TensorRT checks it when loading it; this version has no earlier check")
    reasons = " and ".join(answer.reasons)
    if answer.verdict == "SUBOPTIMAL":
        why = reasons or "it was built for other GPUs"
        return warning(name, f"TensorRT can run it, but not at full speed: {why}", rebuild)
    if not reasons and not cuda.devices:
        return warning(
            name,
            "its header is valid; TensorRT checks the rest only on a host with a GPU",
            "Run `mistralc doctor` on the bundle again on the host with the GPU.",
        )
    why = reasons or "no reason given"
    return failed(
        name, f"TensorRT refuses it: {why}", _remedy(answer.remedies or (REBUILD,), rebuild)
    )


def _remedy(kinds: tuple[str, ...], rebuild: str) -> str:
    text = {
        COPY: f"Copy the bundle again from where it was built, or: {rebuild}",
        REBUILD: rebuild,
        MEMORY: "nvidia-smi    shows what else uses the GPU; or export with --precision int4wo",
        DRIVER: _update(max(MIN_DRIVER)),
    }
    return "; ".join(text[kind] for kind in kinds)


def _update(cuda_major: int) -> str:
    minimum = MIN_DRIVER.get(cuda_major)
    newer = f"driver {minimum} or later" if minimum else "a newer driver"
    return f"Install NVIDIA {newer} (CUDA {cuda_major}), restart, and check it with: nvidia-smi"


def _matches(capability: str, pattern: str) -> bool:
    return capability == pattern or pattern == capability.partition(".")[0] + ".x"
