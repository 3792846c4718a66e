"""Turn TensorRT's nested build phases, and the bytes it writes, into one progress count."""

from collections.abc import Callable
from typing import Any

Progress = Callable[[int], None]  # called with the number of bytes just compiled or written


class Meter:
    """Progress in bytes, up to twice the weights': half for compiling, half for writing."""

    def __init__(self, nbytes: int, progress: Progress | None) -> None:
        self.nbytes, self.progress = nbytes, progress
        self.compiled, self.reported = 0.0, 0

    def compile(self, share: float) -> None:
        """Set the share of compiling that is done, 0 to 1; it never goes back."""
        self.compiled = max(self.compiled, min(1.0, share))
        self._report(int(self.compiled * self.nbytes))

    def write(self, nbytes: int) -> None:
        """Set the bytes of the plan written so far; writing starts when compiling is done."""
        self._report(min(self.nbytes + nbytes, 2 * self.nbytes))

    def _report(self, done: int) -> None:
        if self.progress is not None and done > self.reported:
            self.progress(done - self.reported)
            self.reported = done


class Phases:
    """Progress of nested phases: each phase is one step of the phase that contains it."""

    def __init__(self) -> None:
        self._steps: dict[str, list[int]] = {}  # phase -> [steps done, all steps], outermost first

    def start(self, name: str, steps: int) -> None:
        """Begin a phase inside the one that began last."""
        self._steps[name] = [0, max(1, steps)]

    def finish(self, name: str) -> None:
        """End a phase."""
        self._steps.pop(name, None)

    def step(self, name: str, done: int) -> None:
        """Set the number of steps of a phase that are done."""
        if name in self._steps:
            self._steps[name][0] = done

    @property
    def share(self) -> float:
        """Share of the outermost phase that is done, 0 to 1."""
        share = 0.0
        for done, steps in reversed(self._steps.values()):
            share = min(1.0, (done + share) / steps)
        return share


def make_monitor(trt: Any, meter: Meter) -> Any:
    """Return an IProgressMonitor that reports compiling to `meter`."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Follows the builder's phases. TensorRT calls it from its own threads."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases = Phases()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:  # noqa: ARG002
            """Begin a phase."""
            self.phases.start(phase_name, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            """End a phase."""
            self.phases.finish(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            """Count one step; True tells the builder to continue."""
            self.phases.step(phase_name, step + 1)
            meter.compile(self.phases.share)
            return True

    return Monitor()
