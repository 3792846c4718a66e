"""Run `generate --session` with a damaged session file or on a full disk.

Runs are forks of this process, as in `commands.py`, so this process loads no model itself.
"""

import random
from pathlib import Path

from graphs.errors import MistralcError
from graphs.manifest import read_manifest
from runtime.decoding import snapshot
from tests.reliability.harness.damage import edit_bytes
from tests.reliability.harness.guard import check_message
from tests.reliability.harness.trial import Trial
from tests.reliability.trials.commands import Command, run, small_disk
from tests.support.make_checkpoint import tiny_spec, write_checkpoint

SHORT, LONG = "The ring", "The ring turns, and what it forgets it never knew."


def _generate(prompt: str) -> Command:
    words = ("generate", "{folder}/bundle", prompt, "--session", "{out}", "--max-new-tokens", "8",
             "--threads", "1", "--quiet")  # fmt: skip
    return Command(words=words, open=Path.read_bytes, may_remain=lambda _name: False)


def inputs(folder: Path) -> None:
    """Write a bundle and a session file."""
    write_checkpoint(folder / "checkpoint", tiny_spec())
    export = ("export", "{folder}/checkpoint", "-o", "{out}", "--context", "96", "--quiet")
    export_command = Command(words=export, open=read_manifest, may_remain=lambda _name: False)
    for command, out in (
        (export_command, folder / "bundle"),
        (_generate(SHORT), folder / "session"),
    ):
        code, errors = run(command, folder, out).wait()
        assert code == 0, errors


def damaged(folder: Path, draw: random.Random) -> str:
    """Edit the session file one to three times: the command must refuse it and not change it."""
    path, good = folder / "damaged", (folder / "session").read_bytes()
    bad = good
    while bad == good:
        for _ in range(draw.randint(1, 3)):
            bad = edit_bytes(draw, bad)
    path.write_bytes(bad)
    code, errors = run(_generate(LONG), folder, path).wait()
    _check_refusal(code, errors)
    assert path.read_bytes() == bad, "the command changed a file that it refused"
    return "refused"


def full_disk(folder: Path, draw: random.Random) -> str:
    """Save twice on a small disk: each save is complete, or the previous file survives."""
    manifest = read_manifest(folder / "bundle")
    outcome = "completed"
    with small_disk(folder / "disk", draw) as place:
        path = place / "session"
        for prompt in (SHORT, LONG):
            before = path.read_bytes() if path.exists() else None
            code, errors = run(_generate(prompt), folder, path).wait()
            if code:
                _check_refusal(code, errors)
                assert (path.read_bytes() if path.exists() else None) == before, (
                    "the previous session was lost"
                )
                outcome = "refused"
            if path.exists():
                snapshot.load(path, manifest)
            assert [other.name for other in place.iterdir() if other != path] == []
    return outcome


def _check_refusal(code: int, errors: str) -> None:
    assert code == MistralcError.exit_code, f"status {code}: {errors}"
    assert errors.startswith("mistralc: "), errors
    check_message(errors.removesuffix("\n"))


TRIALS = (
    Trial(name="generate --session, file damaged", prepare=inputs, run_once=damaged),
    Trial(name="generate --session, disk full", prepare=inputs, run_once=full_disk),
)
