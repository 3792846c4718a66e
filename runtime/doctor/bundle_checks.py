"""Check that a bundle is whole and that this host can run it. Loads no model."""

from collections.abc import Mapping
from pathlib import Path

from graphs.errors import MistralcError, UsageError
from graphs.manifest import Manifest, manifest_bytes, parse_manifest
from graphs.targets import TARGETS, Target
from runtime.bundle.open import check_files
from runtime.bundle.signature import check_signature, required_key
from runtime.doctor.finding import Check, failed, ok, warning
from runtime.doctor.plan_checks import Engine, check_engine
from runtime.system import host
from runtime.system.host import Cuda, Library, release


def check_bundle(
    path: Path,
    libraries: Mapping[str, Library],
    providers: tuple[str, ...],
    cuda: Cuda,
    require_signature: Path | None = None,
) -> list[Check]:
    """Check that a bundle is whole and that this host has its backend and enough memory.

    `require_signature` is passed to `open_bundle`. TensorRT gets to see a plan only if its bytes
    are those that the manifest lists.
    """
    checks: list[Check] = []
    key = required_key(require_signature)
    try:
        data = manifest_bytes(path)
        if key is not None:
            checks.append(
                ok("signature", f"by the required key {check_signature(data, path, key)}")
            )
        manifest = parse_manifest(data, path)
    except UsageError:
        raise
    except MistralcError as error:
        export = f"mistralc export CHECKPOINT -o {path} --force"
        if key is None or checks:
            return [*checks, failed("manifest", str(error), export)]
        return [failed("signature", str(error), f"mistralc sign {path} --key PRIVATE_KEY")]
    rebuild = rebuild_command(path, manifest)
    size = manifest.file_bytes
    checks.append(
        ok("manifest", f"schema {manifest.schema}, {manifest.target}, {manifest.precision}, "
           f"written by mistralc {manifest.versions.get('mistralc', '?')}")
    )  # fmt: skip
    whole = True
    try:
        check_files(path, manifest, in_full=key is not None)
        checks.append(ok("files", f"{len(manifest.files)} intact, {size / 1e6:,.1f} MB"))
    except MistralcError as error:
        whole = False
        checks.append(failed("files", str(error), rebuild))
    target = TARGETS.get(manifest.target)
    if target is None:
        found = f"this version of mistralc has no target {manifest.target!r}"
        return [*checks, failed("target", found, "pip install --upgrade mistralc")]
    library = libraries[target.backend_module]
    checks.append(check_backend(manifest, target, library, providers))
    engine = engine_of(path, manifest)
    if engine is not None and whole:
        checks += check_engine(engine, library, cuda, rebuild)
    return [*checks, check_room(manifest, host.memory_total(), host.memory_available(), cuda)]


def engine_of(path: Path, manifest: Manifest) -> Engine | None:
    """Return what the manifest says about the bundle's plan; None if it holds no plan."""
    target = TARGETS[manifest.target]
    if not target.holds_plan:
        return None
    gpus = () if manifest.engine is None else manifest.engine.get("gpus", ())
    (plan,) = target.loaded_files
    return Engine(
        plan=path / plan,
        target=target,
        version=_recorded(manifest, target),
        compute_capabilities=tuple(f"{gpu[2:-1]}.{gpu[-1]}" for gpu in gpus),  # sm89 is 8.9
    )


def check_backend(
    manifest: Manifest, target: Target, library: Library, providers: tuple[str, ...]
) -> Check:
    """Check that the target's backend is installed, can be imported and is not too old."""
    name = "backend"
    install = f"pip install 'mistralc[{target.name}]'"
    if library.version is None:
        found = f"the target {target.name} needs {library.name}, which is not installed"
        return failed(name, found, install)
    if library.problem is not None:
        fault = broken(library)
        return failed(name, f"{library.name} {fault.found}", str(fault.remedy))
    found = f"{library.distribution or library.name} {library.version}"
    if target.holds_plan:
        return ok(name, found)  # `check_version` is stricter
    if release(library.version) < target.min_backend_version:
        oldest = ".".join(map(str, target.min_backend_version))
        return failed(name, f"{found}; expected {oldest} or later", f"{install} --upgrade")
    if target.execution_provider is not None and target.execution_provider not in providers:
        return failed(
            name,
            f"{found} has no {target.execution_provider}",
            f"pip uninstall {library.name}    then: {install}",
        )
    recorded = _recorded(manifest, target)
    if recorded is not None and release(library.version) < release(recorded):
        return warning(
            name,
            f"{found}; the bundle was verified with {recorded}",
            f"pip install {library.distribution}=={recorded}",
        )
    return ok(name, found)


def check_room(manifest: Manifest, total: int | None, available: int | None, cuda: Cuda) -> Check:
    """Check that weights and full ring fit in the host's memory, or in that of the first GPU."""
    weights = max((entry.size for entry in manifest.files.values()), default=0)
    ring = manifest.contract.ring_bytes
    needed = weights + ring
    found = f"{weights / 1e6:,.1f} MB of weights and {ring / 1e6:,.1f} MB of ring"
    smaller = "mistralc export    with a smaller --precision, --window or --max-batch"
    if TARGETS[manifest.target].on_gpu:
        if not cuda.devices:
            return ok("room", f"{found}; compare with the memory of the GPU that will run it")
        device = cuda.devices[0]
        found += f", {device.memory_bytes / 1e6:,.1f} MB on the {device.name}"
        return failed("room", found, smaller) if device.memory_bytes < needed else ok("room", found)
    if total is None or available is None:
        return ok("room", found)
    found += f", {available / 1e6:,.1f} MB available"
    if total < needed:
        return failed("room", f"{found} of {total / 1e6:,.1f} MB", smaller)
    if available < needed:
        return warning("room", found, "Stop other programs, or move the bundle to another host.")
    return ok("room", found)


def rebuild_command(path: Path, manifest: Manifest) -> str:
    """Return the command that exports this bundle again. The checkpoint's path is not recorded."""
    name = manifest.checkpoint["name"]
    words = ["mistralc", "export", name if name == "smollm2" else f"PATH/TO/{name}", "-o", path]
    words += ["--target", manifest.target, "--precision", manifest.precision]
    if manifest.window_source == "user":
        words += ["--window", manifest.model.windows[0]]
    elif not manifest.model.slides:
        words += ["--context", manifest.ring.context]
    words += ["--chunk", manifest.ring.chunk]
    if manifest.ring.max_batch > 1:
        words += ["--max-batch", manifest.ring.max_batch]
    return " ".join(map(str, [*words, "--force"]))


def broken(library: Library) -> Check:
    """Report a library that is installed but cannot be imported."""
    name = library.distribution or library.name
    return warning(
        library.name,
        f"{library.version} is installed but cannot be imported: {library.problem}",
        f"pip install --force-reinstall {name}",
    )


def _recorded(manifest: Manifest, target: Target) -> str | None:
    """Return the backend version that the bundle was made with; None if it is not recorded."""
    names = target.distributions
    return next((manifest.versions[name] for name in names if name in manifest.versions), None)
