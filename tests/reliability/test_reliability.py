"""No bytes crash a reader: small damaged files by the hundred, and each fault that was found.

`python -m tests.reliability` runs many more of the same cases (docs/reliability.md).
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from calib.layers.work_directory import Layer, Work
from exporter.bundle.staging import write_json
from exporter.tokenizer.bpe import merges_from_ranks
from exporter.tokenizer.read import convert_file, read_tokenizer
from exporter.tokenizer.tekken import read_tekken
from graphs.errors import MistralcError
from graphs.manifest import CHECKSUM, FILE_NAME, _checksum, read_manifest
from runtime.bundle.open import cache_file, open_bundle
from runtime.text.chat_template import ChatTemplate
from runtime.text.tokenizer import Tokenizer
from tests.reliability import application, servers
from tests.reliability.bundles import write_bundle
from tests.reliability.checkpoints import gguf_bytes
from tests.reliability.explore import ROOT, Counts, check
from tests.reliability.guard import outcome_of
from tests.reliability.registry import TARGETS, TRIALS
from tests.reliability.target import Folder, Target
from tests.support.documents import DOCS
from tests.support.make_checkpoint import tiny_spec, write_checkpoint


@pytest.mark.parametrize("target", TARGETS, ids=[target.name for target in TARGETS])
def test_any_damage_is_read_or_refused_in_words(target: Target, tmp_path: Path) -> None:
    counts = check(target, tmp_path)
    assert counts.cases >= target.examples / 2, "hypothesis found too few different cases"
    if target.name != "cache of hashes":  # which opens the bundle whatever it holds
        assert counts.refused, "nothing was damaged enough to be refused"


@pytest.mark.parametrize("target", TARGETS, ids=[target.name for target in TARGETS])
def test_what_is_damaged_was_good_before(target: Target, tmp_path: Path) -> None:
    prepared = target.prepare(tmp_path)
    if prepared.good is not None:
        outcome = outcome_of(lambda: prepared.read(prepared.good), 1 << 20)
        assert outcome == "read", "the cases would all be refused for another reason"


# The guard itself can fail


def test_a_fault_is_counted_in_the_parent_too() -> None:
    counts = Counts(cases=2, read=1, faults=Counter({"where": 1}), examples={"where": "what"})
    assert Counts(**json.loads(json.dumps(counts.to_json()))) == counts


def test_a_reader_that_raises_something_else_is_a_fault() -> None:
    with pytest.raises(KeyError):
        outcome_of(lambda: {}["no such key"], 1)


def test_a_reader_that_takes_memory_out_of_proportion_is_a_fault() -> None:
    with pytest.raises(AssertionError, match="bytes of memory"):
        outcome_of(lambda: print(len(bytearray(os.urandom(1)) * (200 << 20))), 10)


def test_a_reader_that_asks_for_more_than_the_machine_has_is_a_fault() -> None:
    with pytest.raises(MemoryError):
        outcome_of(lambda: print(len(bytearray(1 << 40))), 10)


@pytest.mark.parametrize("message", ["no", "an explanation that breaks off in the"])
def test_a_refusal_without_words_is_a_fault(message: str) -> None:
    def refuse() -> None:
        raise MistralcError(message)

    with pytest.raises(AssertionError):
        outcome_of(refuse, 1)


def test_an_answer_that_is_not_what_was_asked_for_is_a_fault() -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 9, "total_tokens": 12,
             "prompt_tokens_details": {"cached_tokens": 0}}  # fmt: skip
    application._check_usage(usage, 1, 9)
    with pytest.raises(AssertionError, match="9 tokens"):
        application._check_usage(usage, 1, 8)
    asked = {"prompt": "x", "stop": "b", "max_tokens": 2}
    for text, reason in (("abc", "length"), ("ac", "cancelled")):
        choice = application.Choice(text, reason, None)
        with pytest.raises(AssertionError):
            application._check_choices([choice], asked, chat=False)
    with pytest.raises(AssertionError):
        application._refusal(application.Received(422, "application/json", b'{"detail": []}'))


def test_a_text_that_breaks_off_is_right_and_another_is_a_fault() -> None:
    seen = [servers.Seen(prompt="x", began=0, status=200, text="ab")]
    servers._check_texts(seen, {"x": "abc"})
    for right in ("", "acb"):
        with pytest.raises(AssertionError, match="alone"):
            servers._check_texts(seen, {"x": right})
    seen[0].whole = True
    with pytest.raises(AssertionError, match="alone"):
        servers._check_texts(seen, {"x": "abc"})


# Faults that fuzzing found, by class


def forged(folder: Path, **values: Any) -> Path:
    """A bundle whose manifest says something else and has the checksum for it."""
    write_bundle(folder)
    data = json.loads((folder / FILE_NAME).read_bytes()) | values
    del data[CHECKSUM]
    text = json.dumps(data | {CHECKSUM: _checksum(data)}, indent=2) + "\n"
    (folder / FILE_NAME).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"target": {}}, "target"), ({"activation": "int3"}, "activation"),
        ({"checkpoint": "tiny"}, "checkpoint"), ({"checkpoint": {"name": "x"}}, "checkpoint"),
        ({"model": "huggingface"}, "model"), ({"engine": []}, "engine"),
        ({"golden": None}, "golden"), ({"passes": []}, "passes"),
        ({"files": {"model.onnx": {"size": "1", "sha256": "0" * 64}}}, "files, model.onnx"),
        ({"files": {"model.onnx": {"size": 1, "sha256": 5}}}, "files, model.onnx"),
    ],
)  # fmt: skip
def test_a_manifest_with_a_field_of_another_type_is_refused_by_name(
    tmp_path: Path, values: dict[str, Any], named: str
) -> None:
    with pytest.raises(MistralcError, match=rf"does not have the fields .*{named}"):
        read_manifest(forged(tmp_path, **values))


@pytest.mark.parametrize(
    "changes", [{"rope_theta": 1e999}, {"layer_windows": [8.5]}, {"vocab_size": 2**63},
                {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}],
)  # fmt: skip
def test_a_manifest_with_a_model_that_cannot_be_is_refused(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    write_bundle(tmp_path / "good")
    model = read_manifest(tmp_path / "good").model.to_json()
    with pytest.raises(MistralcError, match="expected"):
        read_manifest(forged(tmp_path / "bad", model=model | changes))


def test_a_long_name_in_a_manifest_is_cut_in_the_message(tmp_path: Path) -> None:
    entry = {"size": 1, "sha256": "0" * 64}
    good = json.loads(write_bundle(tmp_path / "good").to_text())["files"]
    with pytest.raises(MistralcError, match="could not be read") as refusal:
        open_bundle(forged(tmp_path / "bad", files=good | {"x" * 5000: entry}))
    assert len(str(refusal.value)) < 1500
    assert str(refusal.value).endswith("Check its permissions and the disk.")


def test_a_nested_cache_of_hashes_is_as_good_as_none(tmp_path: Path) -> None:
    write_bundle(tmp_path)
    open_bundle(tmp_path)
    cache = cache_file()
    assert cache is not None
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text("[" * 100_000, encoding="utf-8")
    open_bundle(tmp_path)


@pytest.mark.parametrize(
    ("file", "values", "named"),
    [
        ("generation_config", {"eos_token_id": [[2]]}, "eos_token_id"),
        ("generation_config", {"eos_token_id": [2**40]}, "eos_token_id"),
        ("tokenizer_config", {"bos_token_id": [1]}, "bos_token_id"),
        ("tokenizer_config", {"bos_token_id": True}, "bos_token_id"),
        ("tokenizer_config", {"chat_template": 5}, "chat_template"),
        ("tokenizer_config", {"add_bos_token": "yes"}, "add_bos_token"),
    ],
)
def test_a_bundles_tokenizer_setting_of_another_type_is_refused_by_name(
    tmp_path: Path, file: str, values: dict[str, Any], named: str
) -> None:
    from exporter.bundle.staging import write_tokenizer

    write_tokenizer(read_tokenizer(write_checkpoint(tmp_path / "model", tiny_spec())), tmp_path)
    path = tmp_path / f"{file}.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | values), encoding="utf-8")
    with pytest.raises(MistralcError, match=f"`{named}`"):
        Tokenizer.load(tmp_path)


def test_a_nested_tokenizer_setting_is_refused(tmp_path: Path) -> None:
    for name in ("tokenizer", "tokenizer_config", "generation_config"):
        (tmp_path / f"{name}.json").write_text("[" * 100_000, encoding="utf-8")
    (tmp_path / "tokenizer.json").write_bytes(
        (write_checkpoint(tmp_path / "model", tiny_spec()) / "tokenizer.json").read_bytes()
    )
    with pytest.raises(MistralcError, match="is not JSON"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer_config.json", {"chat_template": 5}, "chat_template"),
        ("tokenizer_config.json", {"add_bos_token": "yes"}, "add_bos"),
        ("tokenizer_config.json", {"bos_token": ["<s>"]}, "bos"),
        ("tokenizer_config.json", {"eos_token": "\ud800"}, "has no token"),
        ("generation_config.json", {"eos_token_id": [2**70]}, "eos_token_id"),
        ("config.json", {"bos_token_id": 2**70}, "has no token"),
        ("chat_template.jinja", b"\xff\xfe", "text in UTF-8"),
    ],
)
def test_a_checkpoints_tokenizer_setting_of_another_type_is_refused(
    tmp_path: Path, name: str, content: Any, said: str
) -> None:
    path = write_checkpoint(tmp_path, tiny_spec())
    if name != "tokenizer_config.json":
        (path / "tokenizer_config.json").unlink()
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    (path / name).write_bytes(data)
    with pytest.raises(MistralcError, match=said):
        read_tokenizer(path)


def test_half_a_surrogate_pair_in_a_setting_is_written_and_read_back(tmp_path: Path) -> None:
    said = {"version": "v\ud800", "other": "é"}
    write_json(tmp_path / "settings.json", said)
    assert json.loads((tmp_path / "settings.json").read_text(encoding="utf-8")) == said


def test_a_tekken_file_that_reserves_a_billion_tokens_is_refused_at_once(tmp_path: Path) -> None:
    config = {"pattern": "x", "version": "v7", "default_vocab_size": 2**40,
              "default_num_special_tokens": 10**9}  # fmt: skip
    path = tmp_path / "tekken.json"
    path.write_text(json.dumps({"config": config, "vocab": []}), encoding="utf-8")
    with pytest.raises(MistralcError, match="1,000,000,000 special tokens"):
        read_tekken(path)
    path.write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(MistralcError, match="cannot be read as a tekken"):
        read_tekken(path)


def test_a_token_of_a_megabyte_is_cut_where_pieces_are_and_nowhere_else() -> None:
    ranks = {b"a": 0, b"b": 1, b"ab": 2, b"ab" * 2**20: 3}
    found: list[tuple[bytes, bytes]] = []
    # at two million places, of which each copies two megabytes, it would take an hour
    assert outcome_of(lambda: found.extend(merges_from_ranks(ranks)), 2**21) == "read"
    assert found == [(b"a", b"b")]


@pytest.mark.parametrize("column", ["tokens", "scores", "token_type", "model", "bos_token_id"])
@pytest.mark.parametrize("value", [5, "x", ["x"], [0.5]])
def test_a_gguf_vocabulary_with_a_column_of_another_type_is_refused(
    tmp_path: Path, column: str, value: Any
) -> None:
    good = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["<unk>", "a"],
            "tokenizer.ggml.scores": [0.0, 0.0], "tokenizer.ggml.token_type": [2, 1],
            "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 1}  # fmt: skip
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes(good | {f"tokenizer.ggml.{column}": value}))
    with pytest.raises(MistralcError):
        read_tokenizer(path)


def test_a_panic_of_the_tokenizers_package_is_an_error_of_ours(tmp_path: Path) -> None:
    from tests.reliability.vocabularies import _model

    proto = _model()
    proto.pieces[0].piece, proto.pieces[0].type = (
        "\u2581\u2581",
        4,
    )  # user-defined, nothing but spaces
    proto.normalizer_spec.remove_extra_whitespaces = True
    path = tmp_path / "tokenizer.model.v3"
    path.write_bytes(proto.SerializeToString())
    tokenizer = convert_file(path).open()
    with pytest.raises(MistralcError, match="fails on the text"):
        tokenizer.encode(" a")


def test_a_damaged_layer_of_a_stopped_calibration_says_what_to_delete(tmp_path: Path) -> None:
    import torch

    work = Work(directory=tmp_path)
    work.finish(0, Layer(tensors={"x": torch.ones(3)}, facts={}), {})
    (file,) = tmp_path.glob("layer-*")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(MistralcError, match="Delete"):
        work.layer(0)


BOMBS = (
    "{{ 'a' * 10**10 }}", "{{ 10 ** 10 ** 10 }}", "{{ [0] * 10**10 }}", "{{ '%9999999999d' % 1 }}",
    "{{ '%*d' % (9999999999, 1) }}", "{{ '{:9999999999}'.format(1) }}",
    "{{ 'x' | center(10**10) }}", "{{ 'x'.ljust(10**10) }}", "{{ '%9999999999d' | format(1) }}",
    "{{ messages | tojson(indent=10**10) }}", "{{ lipsum(10**5) }}",
    "{% for i in range(100000) %}{{ 'x' * 1000 }}{% endfor %}",
    "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% for i in range(10**9) %}{% endfor %}",
)  # fmt: skip
ESCAPES = (
    "{% include '/etc/passwd' %}", "{{ ''.__class__.__mro__ }}", "{% import 'os' as os %}",
    "{{ messages.__init__.__globals__ }}", "{{ messages.append(1) }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}", "{{ ('x' | attr('__class__')).__mro__ }}",
)  # fmt: skip


@pytest.mark.parametrize("source", [*BOMBS, *ESCAPES])
def test_a_template_that_does_more_than_write_text_is_stopped(source: str) -> None:
    def run() -> None:
        template = ChatTemplate(source, control_tokens=["<s>"], variables={})
        template.render([{"role": "user", "content": "x"}], add_generation_prompt=True)

    assert outcome_of(run, 100) == "refused"


def test_an_error_is_one_paragraph_whatever_it_quotes() -> None:
    shown = str(
        MistralcError("The tensor a\n\x1b[2Jb" + "x" * 5000 + " is not good. Fetch it again.")
    )
    assert "\n" not in shown
    assert "\x1b" not in shown
    assert len(shown) < 1500
    assert shown.endswith("Fetch it again.")


def test_a_folder_of_cases_begins_anew_each_time(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"good")
    folder = Folder(tmp_path)
    read: list[dict[str, bytes]] = []
    run: Callable[[Any], None] = folder.reading(
        lambda path: read.append({file.name: file.read_bytes() for file in path.iterdir()})
    )
    for case in ({"a": b"bad", "b": b"new"}, {}):
        run(case)
    assert read == [{"a": b"bad", "b": b"new"}, {"a": b"good"}]


# Killed, or out of disk


@pytest.mark.parametrize("name", ["calibrate, killed", "calibrate, disk full"])
def test_a_hurt_calibration_leaves_a_whole_table_or_none(name: str) -> None:
    """Of an export, tests/test_bad_input.py shows the same at moments chosen by hand."""
    # in a process without threads: the runs are forks of it
    command = [sys.executable, "-m", "tests.reliability", "--one", name, "--trials", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert (counts["cases"], counts["faults"]) == (2, {})


# The document


def test_the_reliability_document_lists_every_target_and_trial() -> None:
    text = (DOCS / "reliability.md").read_text(encoding="utf-8")
    for one in (*TARGETS, *TRIALS):
        assert re.search(rf"^\| {re.escape(one.name)} \| [\d,]+ ", text, re.MULTILINE), (
            f"{one.name} is not in the table: run python -m tests.reliability --write"
        )
