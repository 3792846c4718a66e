"""What building a bundle takes on the build host, step by step: memory, disk and time.

Arithmetic on a `Build`; opens no file. GB is 10^9 bytes.
"""

from dataclasses import dataclass
from pathlib import Path

from graphs.build import Build
from runtime.bundle.sizes import weight_bytes

TRACE, REFERENCE, COMPILE = (
    "Tracing the decoder and writing weights", "Running the reference", "Building the engine",
)  # fmt: skip
LOAD, VERIFY, GATE, HASH = (
    "Loading the bundle", "Verifying", "Measuring perplexity", "Hashing the bundle",
)  # fmt: skip
"""Names of the steps, as `export` shows them while they run."""

OTHER_FILES = 16_000_000


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
    """What the build host must have. `disk_bytes` is the most that is needed at any time."""

    steps: tuple[HostStep, ...]
    disk_bytes: int
    bundle_bytes: int

    @property
    def memory_bytes(self) -> int:
        """The largest peak of any step."""
        return max(step.memory_bytes for step in self.steps)


def host_needs(build: Build) -> HostNeeds:
    """Work out what building takes. The checkpoint is taken to hold 2 bytes a weight."""
    weights = sum(weight_bytes(build.spec, build.storage, build.activation).values())
    return HostNeeds(
        steps=(HostStep(name=TRACE, seconds=1, memory_bytes=10**9),),
        # An engine is built from a weights file that lies beside it until the plan is complete.
        disk_bytes=(2 if build.target.holds_plan else 1) * weights + OTHER_FILES,
        bundle_bytes=weights + OTHER_FILES,
    )


def require_host(build: Build, needed: HostNeeds, destination: Path) -> None:
    """Raise MistralcError unless this host has the memory and, at `destination`, the disk."""
