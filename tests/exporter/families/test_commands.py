"""`plan` and `export` take every family, and refuse the same targets."""

import json
from pathlib import Path

import pytest

from tests.conftest import Command
from tests.support import families
from tests.support.make_checkpoint import tiny_spec, write_tokenizer

ONE_OF_EACH = {one.family: name for name, one in families.EXAMPLES.items()}


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 2 with a tokenizer, ready to be exported."""
    path = families.write(tmp_path_factory.mktemp("gemma"), "gemma2", wide=True)
    write_tokenizer(path, tiny_spec(vocab_size=families.WIDE["vocab_size"]))
    return path


@pytest.mark.parametrize("name", ONE_OF_EACH.values(), ids=ONE_OF_EACH)
def test_plan_takes_every_family(mistralc: Command, tmp_path: Path, name: str) -> None:
    families.write(tmp_path, name)
    ended = mistralc("plan", tmp_path, "--target", "cpu", "--precision", "int4wo", "--json")
    assert ended.code == 0, ended.err
    planned = json.loads(ended.out)
    found = families.model(name)
    text = getattr(found.model, "language_model", None)
    count = sum(one.numel() for one in (found if text is None else text).parameters())
    head = 0 if text is None else found.lm_head.weight.numel()
    assert planned["parameters"] == count + head


@pytest.mark.parametrize("command", ["plan", "export"])
def test_a_target_without_soft_caps_is_refused_by_both_commands(
    mistralc: Command, gemma: Path, tmp_path: Path, command: str
) -> None:
    output = ["-o", tmp_path / "bundle"] if command == "export" else []
    ended = mistralc(command, gemma, "--target", "rtx", *output)
    assert ended.code == 2
    message = " ".join(ended.err.split())
    assert "caps its attention scores at 5, as Gemma 2 does" in message
    assert message.endswith("Choose --target cpu or cuda.")
    assert not (tmp_path / "bundle").exists()


def test_what_is_left_out_and_which_factors_are_used_is_told(
    mistralc: Command, tmp_path: Path
) -> None:
    images = families.write(tmp_path / "images", "mistral3")
    planned = mistralc("plan", images, "--target", "cpu")
    assert "without multi_modal_projector, vision_tower" in " ".join(planned.out.split())
    phi = families.write(tmp_path / "phi", "phi3, longrope")
    for context, told in ((64, "up to 64 tokens"), (65, "more than 64 tokens")):
        planned = mistralc("plan", phi, "--target", "cpu", "--context", context)
        assert f"factors for texts of {told}" in " ".join(planned.out.split())


def test_a_gemma_2_is_exported_verified_and_described(
    mistralc: Command, gemma: Path, tmp_path: Path
) -> None:
    """With windows in every other layer, both forms of attention, and codes in every linear."""
    bundle = tmp_path / "bundle"
    arguments = ("--precision", "int4wo", "--max-ppl-increase", "9", "--quiet")
    ended = mistralc("export", gemma, "-o", bundle, *arguments)
    assert ended.code == 0, ended.err
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["model"]["attention"]["softcap"] == 5.0
    assert {case["case"] for case in manifest["verification"]["cases"]} >= {"W-1", "W+1", "2W+3"}
    inspected = mistralc("inspect", bundle)
    assert inspected.code == 0, inspected.err
    assert "12 tokens in 1 of 2 layers" in " ".join(inspected.out.split())
