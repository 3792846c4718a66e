"""Whether this host can run a TensorRT plan: versions, GPU, and TensorRT's own check of it.

Knows plans by path and by what was recorded when they were built; knows no manifest.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from graphs.targets import Target
from runtime.backends.plan_validity import COPY, DRIVER, MEMORY, REBUILD, validity
from runtime.doctor.finding import Check, failed, ok, warning
from runtime.system.host import Cuda, Library, release

LEAST_DRIVER = {13: "580", 12: "525"}  # by CUDA's major number, from CUDA's release notes


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """A plan and what was recorded about it when it was built.

    `version` is TensorRT's, None if nobody wrote it down. `compute_capabilities`, such as "8.9",
    is what the plan was built for; empty is everything that its TensorRT supports.
    """

    plan: Path
    target: Target
    version: str | None
    compute_capabilities: tuple[str, ...] = ()


def check_engine(engine: Engine, library: Library, cuda: Cuda, rebuild: str) -> list[Check]:
    """Check a plan against the installed TensorRT and the first GPU.

    `rebuild` is the command that exports the bundle again. Where `library` is not installed, only
    the GPU can be checked.
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
    """Compare TensorRT's version with the one that built the plan: it has to be the same."""
    name, installed = "TensorRT version", f"{library.distribution} {library.version}"
    if engine.version is None:
        return warning(name, f"{installed}; the manifest does not say what built the plan", rebuild)
    if release(engine.version) == release(str(library.version)):
        return ok(name, f"{installed}, which also built the plan")
    return failed(
        name,
        f"TensorRT {engine.version} built the plan and {installed} is installed; a plan runs only "
        "on the version that built it",
        f"pip install {library.distribution}=={engine.version}    or: {rebuild}",
    )


def check_gpu(engine: Engine, cuda: Cuda, rebuild: str) -> Check:
    """Compare the first GPU's compute capability with what the plan was built for."""
    name = "GPU of the plan"
    wanted = engine.compute_capabilities
    if not wanted:
        wanted = engine.target.compute_capabilities or ()
    kinds = f"a GPU of compute capability {' or '.join(wanted)}" if wanted else "an NVIDIA GPU"
    if not cuda.devices:
        elsewhere = re.sub(
            r"--target \w+ --precision \w+", "--target cpu --precision fp32", rebuild
        )
        return failed(
            name,
            f"{cuda.problem}, and the plan needs {kinds}",
            f"Run it on a host with such a GPU, or export it for this one: {elsewhere}",
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
    """Compare the driver's CUDA with the one that the TensorRT package was made for."""
    made_for = re.search(r"cu(\d\d)\b", library.distribution or "")
    if made_for is None or cuda.version is None:
        return []
    needed, newest = int(made_for[1]), ".".join(map(str, cuda.version))
    if cuda.version[0] >= needed:
        return [ok("driver of the plan", f"CUDA {newest}; {library.distribution} needs {needed}")]
    return [
        failed(
            "driver of the plan",
            f"the driver runs CUDA up to {newest}; {library.distribution} needs CUDA {needed}",
            _update(needed),
        )
    ]


def check_plan(engine: Engine, cuda: Cuda, rebuild: str) -> Check:
    """Ask TensorRT whether the plan may run here, and say it in words."""
    name = f"plan {engine.plan.name}"
    try:
        answer = validity(engine.plan, engine.target.backend_module)
    except OSError as error:
        return failed(name, f"it could not be read ({error})", rebuild)
    if answer.verdict == "VALID":
        return ok(name, "TensorRT finds it valid for this host")
    if answer.verdict == "UNKNOWN":
        return ok(name, "TensorRT will check it when it is loaded; it has no check before that")
    reasons = " and ".join(answer.reasons)
    if answer.verdict == "SUBOPTIMAL":
        why = reasons or "it was built for other GPUs"
        return warning(name, f"TensorRT can run it, slower than it could be: {why}", rebuild)
    if not reasons and not cuda.devices:
        return warning(
            name,
            "its header is a plan's; whether it runs, TensorRT only says where there is a GPU",
            "Run `mistralc doctor` on the bundle again on the host that has the GPU.",
        )
    why = reasons or "it gives no reason"
    return failed(
        name, f"TensorRT refuses it: {why}", _remedy(answer.remedies or (REBUILD,), rebuild)
    )


def _remedy(kinds: tuple[str, ...], rebuild: str) -> str:
    text = {
        COPY: f"Copy the bundle again from where it was built, or: {rebuild}",
        REBUILD: rebuild,
        MEMORY: "nvidia-smi    shows what else is using the GPU; or export with --precision int4wo",
        DRIVER: _update(max(LEAST_DRIVER)),
    }
    return "; ".join(text[kind] for kind in kinds)


def _update(cuda_major: int) -> str:
    least = LEAST_DRIVER.get(cuda_major)
    newer = f"driver {least} or later" if least else "a newer driver"
    return f"Install NVIDIA {newer} (CUDA {cuda_major}), restart, and check it with: nvidia-smi"


def _matches(capability: str, pattern: str) -> bool:
    return capability == pattern or pattern == capability.partition(".")[0] + ".x"
