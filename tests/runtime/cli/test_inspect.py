"""The `inspect` command."""

import json
from pathlib import Path

from tests.conftest import CONTEXT, Command
from tests.support.commands import json_output, succeeded


def test_inspect_describes_the_bundle(mistralc: Command, sliding_bundle: Path) -> None:
    out = succeeded(mistralc("inspect", sliding_bundle))
    for fact in ("tiny (huggingface)", "102,720", "16 slots, chunk 8", "none: the text may run on"):
        assert fact in out
    assert "passed against the checkpoint" in out


def test_inspect_reports_the_manifest_and_derived_facts(
    mistralc: Command, plain_bundle: Path
) -> None:
    facts = json_output(mistralc("inspect", plain_bundle, "--json"))
    manifest = json.loads((plain_bundle / "manifest.json").read_text(encoding="utf-8"))
    del manifest["manifest_sha256"]
    assert facts["manifest"].items() >= manifest.items()
    assert facts["parameters"] == 102_720
    assert facts["capacities"] == {"None": CONTEXT}
    assert facts["endless"] is False
    # 2 layers x (key, value) x 2 heads x 16 x 4 bytes, for every slot.
    assert facts["ring_bytes"] == 2 * 2 * 2 * 16 * 4 * CONTEXT
