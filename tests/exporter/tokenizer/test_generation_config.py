"""Which values of `generation_config.json` a bundle carries, refuses, or names as left out."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from exporter.tokenizer.generation import read_generation
from exporter.tokenizer.read import read_tokenizer, require_rows
from graphs.errors import MistralcError
from graphs.manifest import read_manifest
from runtime.decoding.sampling_defaults import sampling_params
from tests.conftest import Command
from tests.support.make_checkpoint import tiny_spec, write_checkpoint


def carried(**values: Any) -> dict[str, Any]:
    return read_generation(values, "generation_config.json")[0]


def notes(**values: Any) -> list[str]:
    return read_generation(values, "generation_config.json")[1]


def test_sampling_is_off_unless_the_file_turns_it_on_as_in_transformers() -> None:
    assert GenerationConfig().do_sample in (None, False)
    found = carried(temperature=0.6, top_p=0.9)
    assert found == {"temperature": 0.6, "top_p": 0.9, "do_sample": False}
    assert sampling_params(found, {}).temperature == 0
    assert sampling_params(found, {"temperature": 0.7}).top_p == 0.9
    assert carried() == {}
    assert carried(top_p=None, do_sample=None) == {}


def test_sampling_without_further_values_has_transformers_defaults() -> None:
    defaults = GenerationConfig._get_default_generation_params()
    params = sampling_params(carried(do_sample=True), {})
    assert (params.temperature, params.top_k, params.top_p) == (
        defaults["temperature"], defaults["top_k"], defaults["top_p"],
    )  # fmt: skip
    assert carried(do_sample=True, top_k=0)["top_k"] == 0


def test_a_negative_top_k_means_off() -> None:
    assert carried(do_sample=True, top_k=-1)["top_k"] == 0


@pytest.mark.parametrize(
    "values",
    [
        {"top_p": 1.5}, {"top_p": -0.1}, {"top_k": -2}, {"top_k": 1.5}, {"temperature": -1.0},
        {"temperature": "0.7"}, {"temperature": math.nan}, {"temperature": 10**400},
        {"temperature": True}, {"min_p": 2}, {"repetition_penalty": 0},
        {"repetition_penalty": math.inf}, {"do_sample": "yes"}, {"stop_strings": [""]},
        {"stop_strings": 5}, {"suppress_tokens": [-1]}, {"suppress_tokens": "1"},
        {"bad_words_ids": [5]}, {"bad_words_ids": [[]]},
    ],
    ids=str,
)  # fmt: skip
def test_a_value_that_no_run_would_accept_is_an_error_at_export(values: dict[str, Any]) -> None:
    name = next(iter(values))
    with pytest.raises(MistralcError, match=rf"generation_config\.json: .*{name}") as raised:
        carried(**values)
    assert "Every run of the bundle would refuse it" in str(raised.value)


def test_tokens_that_are_never_chosen_are_banned_in_every_request() -> None:
    found = carried(suppress_tokens=[7, 3], bad_words_ids=[[5], [1, 2]])
    assert found == {"suppress_tokens": [3, 5, 7]}
    params = sampling_params(found, {"logit_bias": {3: 100.0, 4: 1.0}})
    assert params.logit_bias == {3: -math.inf, 4: 1.0, 5: -math.inf, 7: -math.inf}
    assert notes(bad_words_ids=[[5], [1, 2]]) == [
        "generation_config.json: 1 entries of `bad_words_ids` with several tokens are not carried "
        "over; those with one token are"
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_new_tokens", 256), ("min_new_tokens", 4), ("no_repeat_ngram_size", 3), ("num_beams", 4),
     ("max_length", 4096), ("typical_p", 0.9), ("forced_eos_token_id", 2)],
)  # fmt: skip
def test_what_a_bundle_does_not_carry_is_named(name: str, value: Any) -> None:
    assert carried(**{name: value}) == {}
    assert notes(**{name: value})[0].startswith(
        f"generation_config.json: `{name}` ({value}) is not carried over"
    )


def test_what_a_file_of_transformers_says_by_default_needs_no_note() -> None:
    neutral = GenerationConfig._get_default_generation_params()
    del neutral["max_length"]
    assert notes(**neutral) == []


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny checkpoint with settings for generation, and 20 more rows than tokens."""
    path = write_checkpoint(tmp_path / "model", tiny_spec(vocab_size=340))
    smaller = write_checkpoint(tmp_path / "smaller", tiny_spec(vocab_size=320))
    shutil.copy(smaller / "tokenizer.json", path)
    document = json.loads((path / "tokenizer.json").read_text())
    size = len(document["model"]["vocab"])
    settings = {
        "stop_strings": ["\n\nUser:"], "max_new_tokens": 99, "suppress_tokens": [size - 1],
    }  # fmt: skip
    (path / "generation_config.json").write_text(json.dumps(settings))
    return path


@pytest.mark.usefixtures("kept_traces")
def test_plan_export_inspect_and_verify_say_what_is_carried_and_what_was_compared(
    mistralc: Command, checkpoint: Path, tmp_path: Path
) -> None:
    note = "`max_new_tokens` (99) is not carried over; give --max-new-tokens"
    planned = mistralc("plan", checkpoint, "--target", "cpu")
    assert note in planned.out
    assert json.loads(mistralc("plan", checkpoint, "--json").out)["notes"][0].endswith(note)
    bundle = tmp_path / "bundle"
    ended = mistralc("export", checkpoint, "-o", bundle)
    assert ended.code == 0, ended.err
    assert note in ended.out
    record = read_manifest(bundle).text
    assert record is not None
    assert record["strings"] == 300
    assert record["chats"] == 30
    assert "transformers" in record["compared_with"]
    rows = next(each for each in record["notes"] if "more rows than there are tokens" in each)
    assert rows.startswith("the embedding has 20 more")
    shown = mistralc("inspect", bundle)
    assert "300 strings and 30 chats: the token ids of transformers" in shown.out
    assert note in shown.out
    assert rows in shown.out
    again = mistralc("verify", bundle, "--against", checkpoint, "--short")
    assert again.code == 0, again.err
    assert read_manifest(bundle).text == record
    (checkpoint / "added_tokens.json").write_text('{"<new>": 330}')
    changed = mistralc("verify", bundle, "--against", checkpoint, "--short")
    assert changed.code == 1
    assert "is not the one that" in changed.err


def test_a_forbidden_token_without_a_row_is_an_error(checkpoint: Path) -> None:
    (checkpoint / "generation_config.json").write_text('{"suppress_tokens": [340]}')
    with pytest.raises(MistralcError, match="forbids the token 340, and the embedding has 340 row"):
        require_rows(read_tokenizer(checkpoint), 340)


def test_the_checkpoints_stop_strings_end_an_answer(checkpoint: Path) -> None:
    from runtime.text.text_stream import TextStream

    ours = read_tokenizer(checkpoint).open()
    stream = TextStream(ours, ["stop"], continuation=True)
    text = "".join(stream.push(i) for i in ours.encode("yes\n\nUser: no", add_bos=False))
    assert text.strip() == "yes"
    assert stream.stopped_by == "\n\nUser:"


def test_a_vocabulary_without_rows_is_refused_by_plan_and_export(
    mistralc: Command, checkpoint: Path, tmp_path: Path
) -> None:
    (checkpoint / "added_tokens.json").write_text('{"<|im_end|>": 340}')
    for command in (
        ("plan", checkpoint),
        ("export", checkpoint, "-o", tmp_path / "bundle"),
    ):
        ended = mistralc(*command)
        assert ended.code == 1
        assert "'<|im_end|>' has the id 340, and the embedding has 340 rows" in ended.err
