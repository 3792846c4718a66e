"""Build an engine in a process of its own: `build_engine` here, `main` in the new process.

Alone in a process, TensorRT makes the same plan of the same graph, bit for bit. Next to torch it
does not, because the order of some lists in the plan follows heap addresses. A process of its own
also measures TensorRT's memory separately, and if the kernel kills it for lack of memory, we
report an error instead of dying with it.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from exporter.engine.builder import build_here
from exporter.engine.progress import Progress
from exporter.engine.request import BuildRequest, EnginePlan
from graphs.errors import MistralcError, UsageError
from runtime.system.host import memory_available

BUILDER = (sys.executable, "-P", "-m", "exporter.engine.process")

KEPT_VARIABLES = ("CUDA", "HOME", "LD_", "NVIDIA", "PATH", "TMPDIR", "XDG_CACHE_HOME")
"""Prefixes of the environment variables that the builder process receives."""

ADDR_NO_RANDOMIZE = 0x0040000  # personality(2)
QUERY_PERSONALITY = 0xFFFFFFFF  # personality(2): returns the current one and changes nothing


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
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = dict.fromkeys([sources, *filter(None, given)])
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
    return f"{here}build on a host with more memory, or without --two-profiles."


def fix_addresses() -> None:
    """Restart this process without address space randomization, if the kernel allows it.

    The order of some lists in a plan follows addresses: with randomization, one of 24 builds of
    one graph, side by side, differed, and so did builds in directories whose names differ in
    length. Where the kernel refuses, the process goes on with random addresses.
    """
    personality = ctypes.CDLL(None).personality
    current = personality(QUERY_PERSONALITY)
    if current == -1 or current & ADDR_NO_RANDOMIZE:
        return
    if personality(current | ADDR_NO_RANDOMIZE) != -1:
        os.execv(sys.executable, BUILDER)  # noqa: S606


def main() -> None:
    """Build the request on standard input; answer in lines of JSON: steps, then the result."""
    fix_addresses()
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
