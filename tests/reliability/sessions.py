"""`generate --session` with a file that is damaged, or a disk that is full. Counts what it loses.

Runs are forks of this process, as in `trials.py`, which therefore loads no model itself.
"""

import random
from pathlib import Path

from graphs.errors import MistralcError
from graphs.manifest import read_manifest
from runtime.decoding import snapshot
from tests.reliability.damage import one_edit
from tests.reliability.guard import check_message
from tests.reliability.trial import Trial
from tests.reliability.trials import Command, run, small_disk
from tests.support.make_checkpoint import tiny_spec, write_checkpoint

SHORT, LONG = "The ring", "The ring turns, and what it forgets it never knew."


def _generate(prompt: str) -> Command:
    words = ("generate", "{folder}/bundle", prompt, "--session", "{out}", "--max-new-tokens", "8",
             "--threads", "1", "--quiet")  # fmt: skip
    return Command(words=words, open=Path.read_bytes, kept=lambda _name: False)


def inputs(folder: Path) -> None:
    """A bundle, and the file of a session."""
    write_checkpoint(folder / "checkpoint", tiny_spec())
    export = ("export", "{folder}/checkpoint", "-o", "{out}", "--context", "96", "--quiet")
    made = Command(words=export, open=read_manifest, kept=lambda _name: False)
    for command, out in ((made, folder / "bundle"), (_generate(SHORT), folder / "session")):
        code, errors = run(command, folder, out).ended()
        assert code == 0, errors


def damaged(folder: Path, draw: random.Random) -> str:
    """One to three edits of the file: the command refuses it in words, and leaves it as it is."""
    path, good = folder / "damaged", (folder / "session").read_bytes()
    bad = good
    while bad == good:
        for _ in range(draw.randint(1, 3)):
            bad = one_edit(draw, bad)
    path.write_bytes(bad)
    code, errors = run(_generate(LONG), folder, path).ended()
    _check_refusal(code, errors)
    assert path.read_bytes() == bad, "a file that was refused has changed"
    return "refused"


def full_disk(folder: Path, draw: random.Random) -> str:
    """A text that is kept and goes on: each file is whole, or the one before it is still there."""
    manifest = read_manifest(folder / "bundle")
    outcome = "completed"
    with small_disk(folder / "disk", draw) as place:
        path = place / "session"
        for prompt in (SHORT, LONG):
            before = path.read_bytes() if path.exists() else None
            code, errors = run(_generate(prompt), folder, path).ended()
            if code:
                _check_refusal(code, errors)
                assert (path.read_bytes() if path.exists() else None) == before, "it was lost"
                outcome = "refused"
            if path.exists():
                snapshot.load(path, manifest)
            assert [left.name for left in place.iterdir() if left != path] == []
    return outcome


def _check_refusal(code: int, errors: str) -> None:
    assert code == MistralcError.exit_code, f"status {code}: {errors}"
    assert errors.startswith("mistralc: "), errors
    check_message(errors.removesuffix("\n"))


TRIALS = (
    Trial(name="generate --session, file damaged", prepare=inputs, hurt=damaged),
    Trial(name="generate --session, disk full", prepare=inputs, hurt=full_disk),
)
