"""Build an engine in a process of its own: `build_engine` here, `main` in the new process.

A process of its own can fix its addresses (`addresses.py`), so the same graph gives the same plan,
bit for bit. It also measures TensorRT's memory separately, and if the kernel kills it for lack of
memory, we report an error instead of dying with it.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from exporter.engine.addresses import fix_addresses
from exporter.engine.builder import build_here
from exporter.engine.progress import Progress
from exporter.engine.request import BuildRequest, EnginePlan
from graphs.errors import MistralcError, UsageError
from runtime.system.host import memory_available

BUILDER = (sys.executable, "-P", "-S", "-m", "exporter.engine.process")
"""Without `site`, which runs what others have installed (`sitecustomize`, `.pth` files): every
module that is imported moves what comes after it in memory."""

KEPT_VARIABLES = ("CUDA", "HOME", "LD_", "NVIDIA", "PATH", "TMPDIR", "XDG_CACHE_HOME")
"""Prefixes of the environment variables that the builder process receives."""


def build_engine(request: BuildRequest, progress: Progress | None = None) -> EnginePlan:
    """Compile the graph of `request` into its plan file; `progress` counts up to `request.work`.

    Raises MistralcError with TensorRT's own words if it fails, UsageError if an option is wrong.
    """
    sources = Path(__file__).resolve().parents[2]  # the directory of the package `exporter`
    with subprocess.Popen(  # noqa: S603
        BUILDER,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=request.graph.parent, env=_environment(str(sources)),
    ) as child:  # fmt: skip
        try:
            return _exchange(child, request, progress)
        except BaseException:
            child.kill()
            raise


def _environment(sources: str) -> dict[str, str]:
    """The variables that the builder process needs, in order of their names.

    Every further variable moves what comes after it in memory: setting a time zone or a hash seed
    gave another plan of the same graph, and so did another order of the same variables.
    """
    paths = dict.fromkeys([sources, *filter(None, sys.path)])  # of site-packages, too
    kept = {name: value for name, value in os.environ.items() if name.startswith(KEPT_VARIABLES)}
    found = {**kept, "PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "0"}
    return dict(sorted(found.items()))


def _exchange(
    child: subprocess.Popen[str], request: BuildRequest, progress: Progress | None
) -> EnginePlan:
    """Send the request to the builder process, report its progress, and return its answer."""
    if child.stdin is None or child.stdout is None:
        raise ValueError("the process was started without pipes")
    # Paths relative to its directory: the length of a full path would move later heap allocations.
    here = request.graph.parent
    plan = Path(os.path.relpath(request.plan, here))
    child.stdin.write(replace(request, graph=Path(request.graph.name), plan=plan).to_text())
    child.stdin.close()
    for line in child.stdout:
        answer = json.loads(line)
        if "step" in answer and progress is not None:
            progress(answer["step"])
        if "error" in answer:
            raise (UsageError if answer["usage"] else MistralcError)(answer["error"])
        if "plan" in answer:
            return EnginePlan.from_json(answer["plan"])
    raise _ended(child.wait())


def _ended(code: int) -> MistralcError:
    """The error for a builder process that ended without an answer, with exit status `code`."""
    killed = code == -signal.SIGKILL
    how = (
        "was killed, probably for lack of memory (SIGKILL),"
        if killed
        else f"ended with exit status {code}"
    )
    return MistralcError(
        f"The process that builds the engine {how} before the plan was complete; a whole plan was "
        f"expected, and nothing was left behind. {memory_advice()}"
    )


def memory_advice() -> str:
    """Say how much memory is available, and how to get by with it."""
    available = memory_available()
    here = "" if available is None else f"{available / 1e9:.1f} GB are available here; "
    return f"{here}build on a host with more memory, or with a smaller --precision."


def main() -> None:
    """Build the request on standard input; answer in lines of JSON: steps, then the result."""
    fix_addresses(BUILDER)
    # TensorRT itself writes to standard output: keep that for answers, and give it standard error.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(message: Mapping[str, object]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    request = BuildRequest.from_text(sys.stdin.read())
    try:
        plan = build_here(request, lambda count: answer({"step": count}))
    except MistralcError as error:
        answer({"error": str(error), "usage": isinstance(error, UsageError)})
    except OSError as error:  # most likely a full disk
        answer({"error": f"The plan could not be written: {error}.", "usage": False})
    else:
        answer({"plan": asdict(plan)})


if __name__ == "__main__":
    main()
