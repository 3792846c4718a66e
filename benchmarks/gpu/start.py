"""Start a first session on a GPU from the folder that `pack.py` wrote. Needs no project around it.

    python start.py correctness|speed [--work DIR] [--device cuda]

Unpacks the folder beside this file into DIR (350 MB, seconds), then runs the phase's steps with
everything unpacked in front of what is installed. Prints one line of JSON for each step.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from time import perf_counter

HERE = Path(__file__).resolve().parent
DONE = "unpacked"  # an empty file, written last


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("phase", choices=("correctness", "speed"))
    parser.add_argument("--work", type=Path, default=Path("/dev/shm/mistralc"),  # noqa: S108
                        help="room for 350 MB and the weights: 5 GB for correctness, 16 GB for "
                        "speed")  # fmt: skip
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    given = parser.parse_args()
    work = given.work.resolve()
    began = perf_counter()
    unpack(work)
    print(json.dumps({"step": "unpack", "ok": True, "s": round(perf_counter() - began, 1),
                      "should_take_s": 15}), flush=True)  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.first_session", given.phase, "--shapes",
         work / "shapes", "--weights", work / "weights", "--device", given.device],
        env=environment(work), cwd=work, check=False,
    ).returncode  # fmt: skip


def environment(work: Path) -> dict[str, str]:
    """This process's environment, with what was unpacked in front of what is installed."""
    before = os.environ.get("PYTHONPATH")
    paths = [str(work / name) for name in ("onnxruntime", "wheels", "sources")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, *([before] if before else [])])}


def unpack(work: Path) -> None:
    """Unpack every archive and wheel beside this file, once."""
    if (work / DONE).exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    for archive in sorted(HERE.glob("*.tar.xz")):
        with tarfile.open(archive) as packed:
            packed.extractall(work / archive.name.removesuffix(".tar.xz"), filter="data")
    for wheel in sorted((HERE / "wheels").glob("*.whl")):
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(work / "wheels")  # noqa: S202 - wheels that we packed
    (work / DONE).touch()


if __name__ == "__main__":
    sys.exit(main())
