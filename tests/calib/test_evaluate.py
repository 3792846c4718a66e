"""`mistralc eval`: distance from the reference, multiple choice, and what a user sees of them."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from calib.evaluation.multiple_choice import (
    Accuracy,
    Question,
    Scorer,
    encode,
    measure,
    read_questions,
)
from exporter.checks.evaluate import Evaluation, evaluate, steps
from exporter.decoder.model import load_decoder
from exporter.tokenizer.read import read_tokenizer
from graphs.errors import MistralcError
from graphs.manifest import Manifest, read_manifest
from graphs.spec import ModelSpec, RingSpec
from runtime.backends.session import Ids, Logits
from runtime.decoding.ring import ContextFullError
from runtime.load import load_session
from runtime.measure.perplexity import divergences
from runtime.text.tokenizer import Tokenizer
from tests.conftest import CONTEXT, Command, Ended
from tests.support import tiny
from tests.support.make_checkpoint import tiny_spec

ROOT = Path(__file__).resolve().parents[2]
SLIDING, PLAIN = tiny_spec(window=8), tiny_spec()
ANOTHER = 1  # the seed of other weights of the same shape


def manifest_of(spec: ModelSpec, context: int = 64) -> Manifest:
    return Manifest(
        target="cpu", precision="fp32", activation="float32", model=spec,
        ring=RingSpec(chunk=3, context=context), window_source="checkpoint", checkpoint={},
        versions={}, files={},
    )  # fmt: skip


def texts(spec: ModelSpec, count: int = 3, length: int = 30) -> Ids:
    return tiny.tokens(spec, count * length).reshape(count, length)


def log_softmax(logits: Logits) -> np.ndarray:
    wide = logits.astype(np.float64)
    return wide - np.logaddexp.reduce(wide, axis=-1, keepdims=True)


def told(ended: Ended) -> str:
    assert ended.code == 0, ended.err
    assert ended.err == ""
    return ended.out


def reported(ended: Ended) -> dict[str, Any]:
    out = told(ended)
    assert out.count("\n") == 1
    result: dict[str, Any] = json.loads(out)
    return result


# The distance from a reference


@pytest.mark.parametrize("spec", [SLIDING, PLAIN], ids=["sliding", "plain"])
def test_a_bundle_is_at_no_distance_from_its_own_weights(spec: ModelSpec):
    found = evaluate(tiny.session(spec), manifest_of(spec), texts(spec), tiny.decoder(spec))
    assert found.tokens == 3 * 29
    assert found.kl is not None
    # Logits of about 1 that differ by 1e-6 have distributions that differ by half its square.
    assert 0 <= found.kl < 1e-10
    assert found.top1 == 1
    assert found.reference_perplexity == pytest.approx(found.perplexity, rel=1e-5)


@pytest.mark.parametrize("spec", [SLIDING, PLAIN], ids=["sliding", "plain"])
def test_distance_is_the_mean_divergence_of_the_bundle_from_the_reference(spec: ModelSpec):
    cut, other = texts(spec), tiny.decoder(spec, ANOTHER)
    found = evaluate(tiny.session(spec), manifest_of(spec), cut, other)
    p, q = (
        np.concatenate([log_softmax(tiny.at_once(model, ids)[:-1]) for ids in cut])
        for model in (other, tiny.decoder(spec))
    )  # reference, bundle
    true = cut[:, 1:].reshape(-1, 1)
    # Sums over 87 positions of numbers of about 1 that differ by 1e-6 where float32 rounds.
    assert found.kl == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), abs=1e-5)
    assert found.kl > 0.1, "other weights are to be far away"
    assert found.top1 == (p.argmax(-1) == q.argmax(-1)).mean()
    assert found.top1 < 0.5
    for log, perplexity in ((p, found.reference_perplexity), (q, found.perplexity)):
        mean = -np.take_along_axis(log, true, -1).mean()
        assert perplexity == pytest.approx(math.exp(mean), rel=1e-5)


def test_the_reference_slides_as_the_bundle_does():
    far = load_decoder(PLAIN, tiny.weights(PLAIN).__getitem__)  # the same weights, no window
    found = evaluate(tiny.session(SLIDING), manifest_of(SLIDING), texts(SLIDING), far)
    assert found.kl is not None
    assert found.kl > 1e-4, "a million times what is seen where both slide"


def test_divergence_is_zero_of_equals_and_known_of_a_coin():
    fair, bent = np.log([[0.5, 0.5]]), np.log([[0.9, 0.1]])
    same, known = (np.concatenate(list(divergences(fair, q))) for q in (fair, bent))
    assert same == 0
    # 0.5 ln(0.5/0.9) + 0.5 ln(0.5/0.1), to the last digits of float64
    assert known == pytest.approx(0.5 * math.log(0.25 / 0.09), rel=1e-12)


@pytest.mark.parametrize("compared", [False, True])
def test_progress_ends_where_it_was_said_to_end(compared: bool):
    counted: list[int] = []
    reference = tiny.decoder(PLAIN) if compared else None
    evaluate(tiny.session(PLAIN), manifest_of(PLAIN), texts(PLAIN), reference, counted.append)
    assert sum(counted) == steps(texts(PLAIN), compared=compared)


def test_results_are_plain_data_and_a_table():
    alone = Evaluation(perplexity=math.inf, tokens=1000)
    assert json.loads(json.dumps(alone.to_json(), allow_nan=False))["perplexity"] is None
    assert alone.to_markdown().splitlines()[-1] == "| 1,000 | inf |"
    both = Evaluation(perplexity=11, tokens=9, reference_perplexity=10, kl=0.025, top1=0.5)
    lines = both.to_markdown().splitlines()
    assert lines[-1] == "| 9 | 11.0000 | 10.0000 | +10.00% | 2.50e-02 | 50.00% |"
    assert len({line.count("|") for line in lines}) == 1


# Multiple choice


@pytest.fixture(scope="module")
def tokenizer(plain_checkpoint: Path) -> Tokenizer:
    return read_tokenizer(plain_checkpoint).open()


def by_hand(spec: ModelSpec, ids: list[int], start: int) -> tuple[float, bool]:
    logits = log_softmax(tiny.at_once(tiny.decoder(spec), np.array(ids)))[start - 1 : -1]
    found = np.take_along_axis(logits, np.array(ids)[start:, None], -1)
    return float(found.sum()), bool((logits.argmax(-1) == ids[start:]).all())


@pytest.mark.parametrize("spec", [SLIDING, PLAIN], ids=["sliding", "plain"])
def test_continuations_score_as_in_one_pass_whatever_was_scored_before(spec: ModelSpec):
    """Shared prefixes, rewinds within the slack of a ring and beyond it, and strangers."""
    scorer = Scorer(tiny.session(spec), manifest_of(spec))
    text = tiny.tokens(spec, 60).tolist()
    cases = [(text[:40], 20), (text[:40], 39), ([*text[:39], 7], 39), ([*text[:38], 3, 4], 38),
             ([*text[:21], 9, 9, 9], 21), (text, 58), (text[30:50], 1), (text[:5], 5)]  # fmt: skip
    for ids, start in cases:
        found = scorer.score(ids, start)
        log, greedy = by_hand(spec, ids, start)
        # Up to 20 log-probabilities of float32 logits of about 1, each within 1e-6.
        assert found.log == pytest.approx(log, abs=2e-5)
        assert found.greedy == greedy


def test_a_continuation_is_greedy_exactly_where_the_model_would_write_it():
    scorer, ids = Scorer(tiny.session(PLAIN), manifest_of(PLAIN)), tiny.tokens(PLAIN, 6).tolist()
    for _ in range(5):
        ids.append(int(tiny.at_once(tiny.decoder(PLAIN), np.array(ids))[-1].argmax()))
    assert scorer.score(ids, 6).greedy
    assert not scorer.score([*ids[:-1], (ids[-1] + 1) % PLAIN.vocab_size], 6).greedy


def test_a_choice_is_scored_the_same_to_the_bit_in_any_order():
    prompt = tiny.tokens(SLIDING, 30).tolist()
    choices = [[*prompt, 5], [*prompt, 6, 7], [*prompt, 8]]
    found = []
    for order in (choices, choices[::-1]):
        scorer = Scorer(tiny.session(SLIDING), manifest_of(SLIDING))
        found.append([scorer.score(ids, len(prompt)).log for ids in order])
    assert found[0] == found[1][::-1]


def test_a_text_longer_than_the_context_is_refused():
    scorer = Scorer(tiny.session(PLAIN), manifest_of(PLAIN, context=20))
    assert scorer.longest == 21
    scorer.score([5] * 21, 3)
    with pytest.raises(ContextFullError, match="holds 20 in all"):
        scorer.score([5] * 22, 3)
    assert Scorer(tiny.session(SLIDING), manifest_of(SLIDING)).longest is None


def question(context: str, *choices: str, answer: int = 0) -> Question:
    return Question(context=context, choices=choices, answer=answer)


def test_one_space_joins_context_and_choice_unless_there_is_white_space(tokenizer: Tokenizer):
    for context, choice, expected in [
        ("The sky is", "blue", "The sky is blue"),
        ("The sky is", " blue", "The sky is blue"),
        ("The sky is\n", "blue", "The sky is\nblue"),
        ("", "blue", "blue"),
    ]:
        wholes, start = encode(question(context, choice, "red"), tokenizer)
        assert tokenizer.decode(wholes[0]) == expected
        assert start == 1 + len(context), "the BOS, and a token for each byte of the context"


def test_where_nothing_stands_before_a_choice_a_bos_does(plain_checkpoint: Path):
    files = read_tokenizer(plain_checkpoint)

    def opened(**settings: Any) -> Tokenizer:
        return replace(files, tokenizer_config=files.tokenizer_config | settings).open()

    for settings, first in (({}, 1), ({"bos_token_id": None}, 2)):
        wholes, start = encode(question("", "a", "b"), opened(add_bos_token=False, **settings))
        assert start == 1
        assert [len(ids) for ids in wholes] == [2, 2]
        assert {ids[0] for ids in wholes} == {first}
    stranger = replace(files, tokenizer_config={}, generation_config={}).open()
    with pytest.raises(MistralcError, match="neither a BOS nor an end of text"):
        encode(question("", "a", "b"), stranger)


def test_a_choice_that_merges_with_its_context_is_scored_from_the_token_that_they_make():
    vocabulary = {"b": 0, "c": 1, "Ġ": 2, "Ġb": 3}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[("Ġ", "b")]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    merging = Tokenizer(backend, {}, {})
    assert encode(question("c ", "c", "cc"), merging) == ([[1, 2, 1], [1, 2, 1, 1]], 2)
    assert encode(question("c ", "c", "b"), merging) == ([[1, 2, 1], [1, 3]], 1), "for both alike"


def right_answers(
    spec: ModelSpec, tokenizer: Tokenizer, questions: list[Question]
) -> tuple[list[int], list[int]]:
    """The likeliest choice of each question, and the likeliest by character."""
    plain, normalized = [], []
    for asked in questions:
        wholes, start = encode(asked, tokenizer)
        logs = [by_hand(spec, ids, start)[0] for ids in wholes]
        plain.append(int(np.argmax(logs)))
        normalized.append(int(np.argmax([
            log / len(choice) for log, choice in zip(logs, asked.choices, strict=True)
        ])))  # fmt: skip
    return plain, normalized


def test_accuracy_counts_the_likeliest_choice_and_the_likeliest_by_character(tokenizer: Tokenizer):
    questions = [
        question("The ring turns", "a", "bc de", "fghijklmno"), question("Zwei", "drei", "4"),
        question("Once", "upon a time", "more"), question("", "ja", "no"), question("x ", "y", "z"),
    ]  # fmt: skip
    plain, normalized = right_answers(PLAIN, tokenizer, questions)
    assert plain != normalized, "length is to matter in one of them at least"
    counted: list[int] = []
    asked = [replace(q, answer=at) for q, at in zip(questions, plain, strict=True)]
    session, manifest = tiny.session(PLAIN), manifest_of(PLAIN)
    found = measure(session, manifest, tokenizer, asked, counted.append)
    agreed = sum(a == b for a, b in zip(plain, normalized, strict=True))
    assert (found.accuracy, found.normalized) == (1, agreed / 5)
    assert len(counted) == 5
    asked = [replace(q, answer=at) for q, at in zip(questions, normalized, strict=True)]
    found = measure(session, manifest, tokenizer, asked)
    assert (found.accuracy, found.normalized) == (agreed / 5, 1)


def test_the_standard_error_is_that_of_a_mean_of_zeros_and_ones():
    found = Accuracy(questions=10, accuracy=0.3, normalized=1.0)
    drawn = np.array([1] * 3 + [0] * 7)
    expected = drawn.std(ddof=1) / math.sqrt(10)
    assert found.accuracy_stderr == pytest.approx(expected, rel=1e-12)  # rounding of float64
    assert found.normalized_stderr == 0
    assert "| 10 | 30.00% ± 15.28% | 100.00% ± 0.00% |" in found.to_markdown()
    alone = Accuracy(questions=1, accuracy=1.0, normalized=0.0)
    assert alone.to_json()["accuracy_stderr"] is None
    assert "| 1 | 100.00% | 0.00% |" in alone.to_markdown()


GOOD = {"question": "2 + 2 =", "choices": ["4", "5"], "answer": 0}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({"choices": ["4", "5"], "answer": 0}, "has no text in either"),
        (GOOD | {"context": "also"}, "has both of them"),
        (GOOD | {"question": 4}, "has no text in either"),
        (GOOD | {"choices": ["4"]}, "has no two or more texts"),
        (GOOD | {"choices": ["4", ""]}, "has no two or more texts"),
        (GOOD | {"choices": ["4", 5]}, "has no two or more texts"),
        (GOOD | {"choices": "45"}, "has no two or more texts"),
        (GOOD | {"choices": None}, "has no two or more texts"),
        (GOOD | {"answer": 2}, "has the answer 2 to 2 choices"),
        (GOOD | {"answer": -1}, "has the answer -1"),
        (GOOD | {"answer": "4"}, "has the answer '4'"),
        (GOOD | {"answer": True}, "has the answer True"),
        (GOOD | {"answer": None}, "has the answer None"),
    ],
)
def test_a_line_that_is_no_question_is_named(line: dict[str, Any], expected: str, tmp_path: Path):
    file = tmp_path / "task.jsonl"
    file.write_text(json.dumps(GOOD) + "\n" + json.dumps(line) + "\n", encoding="utf-8")
    with pytest.raises(MistralcError, match=r"task.jsonl, line 2 .* is expected") as refused:
        read_questions(file)
    assert expected in str(refused.value)


# The command


def text_file(directory: Path, count: int = 200) -> Path:
    """So many tokens, the BOS included, for a vocabulary of bytes."""
    file = directory / "text.txt"
    file.write_text(("The ring turns. " * count)[: count - 1], encoding="utf-8")
    return file


def task_file(directory: Path) -> Path:
    file = directory / "task.jsonl"
    lines = [GOOD, {"context": "Paris is in", "choices": ["France", "Peru"], "answer": 1}]
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return file


def test_eval_reports_perplexity_and_says_which_text_it_is_of(
    mistralc: Command, sliding_bundle: Path, tmp_path: Path
):
    file = text_file(tmp_path)
    result = reported(
        mistralc("eval", sliding_bundle, "--text", file, "--length", 40, "--limit", 3, "--json")
    )
    assert result["bundle"] == str(sliding_bundle)
    assert result["text"] | {"fingerprint": None} == {
        "source": "text.txt", "fingerprint": None, "windows": 3, "length": 40
    }  # fmt: skip
    assert result["tokens"] == 3 * 39
    # Random weights: near the perplexity of 320 equal choices, and never 10 times off.
    assert 100 < result["perplexity"] < 1000
    assert (result["against"], result["kl"], result["top1"]) == (None, None, None)
    out = told(mistralc("eval", sliding_bundle, "--text", file, "--length", 40, "--limit", 3))
    assert out.splitlines()[0] == "Text: text.txt; 3 windows of 40 tokens."
    assert out.splitlines()[-1] == f"| 117 | {result['perplexity']:.4f} |"


def test_eval_says_so_where_it_fell_back_on_its_own_text(mistralc: Command, sliding_bundle: Path):
    out = told(mistralc("eval", sliding_bundle, "--limit", 1))
    assert "default" in out.splitlines()[0]
    assert "1 windows of 512 tokens" in out.splitlines()[0]
    result = reported(mistralc("eval", sliding_bundle, "--limit", 1, "--json"))
    assert "default" in result["text"]["source"]


def test_eval_joins_several_files(mistralc: Command, sliding_bundle: Path, tmp_path: Path):
    file = text_file(tmp_path)
    ended = mistralc(
        "eval", sliding_bundle, "--text", file, "--text", file, "--length", 40, "--json"
    )
    assert reported(ended)["text"]["windows"] == 10


def test_eval_against_the_checkpoint_measures_the_distance_from_it(
    mistralc: Command, sliding_bundle: Path, sliding_checkpoint: Path, tmp_path: Path
):
    words = ("eval", sliding_bundle, "--text", text_file(tmp_path), "--length", 40)
    result = reported(mistralc(*words, "--against", sliding_checkpoint, "--json"))
    assert result["against"] == str(sliding_checkpoint)
    assert result["kl"] < 1e-10  # see the first test
    assert result["top1"] == 1
    assert result["reference_perplexity"] == pytest.approx(result["perplexity"], rel=1e-5)
    out = told(mistralc(*words, "--against", sliding_checkpoint))
    assert "| +0.00% |" in out
    assert out.splitlines()[-1].endswith("| 100.00% |")


def test_eval_against_another_checkpoint_is_refused(
    mistralc: Command, sliding_bundle: Path, plain_checkpoint: Path, tmp_path: Path
):
    words = ("eval", sliding_bundle, "--text", text_file(tmp_path), "--length", 40)
    ended = mistralc(*words, "--against", plain_checkpoint)
    assert ended.code == 1
    assert "is another checkpoint" in ended.err


def test_eval_with_choices_alone_answers_them_and_reads_no_text(
    mistralc: Command, sliding_bundle: Path, tmp_path: Path
):
    task = task_file(tmp_path)
    result = reported(mistralc("eval", sliding_bundle, "--choices", task, "--json"))
    assert result.keys() == {"bundle", "choices"}
    assert result["choices"]["questions"] == 2
    manifest = read_manifest(sliding_bundle)
    session = load_session(sliding_bundle, manifest, threads=1)
    tokenizer = Tokenizer.load(sliding_bundle)
    expected = measure(session, manifest, tokenizer, read_questions(task))
    assert result["choices"] == expected.to_json()
    assert told(mistralc("eval", sliding_bundle, "--choices", task)) == expected.to_markdown()


def test_eval_measures_text_beside_choices_where_it_is_asked_for(
    mistralc: Command, sliding_bundle: Path, tmp_path: Path
):
    words = ("eval", sliding_bundle, "--choices", task_file(tmp_path))
    result = reported(mistralc(*words, "--text", text_file(tmp_path), "--length", 40, "--json"))
    assert result["tokens"] == 5 * 39
    assert result["choices"]["questions"] == 2
    assert "windows of 512" in told(mistralc(*words, "--limit", 1))


def test_eval_refuses_what_it_cannot_measure(mistralc: Command, plain_bundle: Path, tmp_path: Path):
    file, task = text_file(tmp_path), tmp_path / "task.jsonl"
    task.write_text("{", encoding="utf-8")
    for words, code, expected in [
        ((), 2, f"Windows of 512 tokens were asked for, and this bundle holds {CONTEXT} in all"),
        (("--text", file), 2, "at least one window of 512 is expected"),
        (("--text", tmp_path / "none", "--length", 9), 1, "could not be read"),
        (("--choices", task), 1, "line 1 is not JSON"),
        (("--length", 1), 2, "greater than or equal to 2"),
        (("--limit", 0), 2, "greater than or equal to 1"),
    ]:
        ended = mistralc("eval", plain_bundle, *words)
        assert ended.code == code, expected
        assert expected in ended.err
        assert ended.out == ""
    ended = mistralc("eval", tmp_path / "nothing")
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith("mistralc: There is no bundle at ")


def test_a_question_longer_than_the_context_is_named(
    mistralc: Command, plain_bundle: Path, tmp_path: Path
):
    task = tmp_path / "task.jsonl"
    task.write_text(json.dumps(GOOD | {"question": "x" * CONTEXT}), encoding="utf-8")
    ended = mistralc("eval", plain_bundle, "--choices", task)
    assert ended.code == 1
    assert f"{task}, line 1: " in ended.err
    assert f"this bundle holds {CONTEXT} in all" in ended.err


BLOCKED = """
import sys
import mistralc
try:
    mistralc.main()
except SystemExit as ended:
    assert not ended.code
built = {"torch", "onnx", "onnx_ir", "onnxscript", "safetensors", "gguf"} & sys.modules.keys()
assert not built, f"eval has imported {built}"
"""


def test_measuring_a_bundle_needs_neither_torch_nor_onnx(sliding_bundle: Path, tmp_path: Path):
    # A production host has none of them; its own process shows it, this one has them all.
    words = ("--text", text_file(tmp_path), "--length", "40", "--choices", task_file(tmp_path))
    for arguments in ((sliding_bundle, *words), ("--help",)):
        command = [sys.executable, "-c", BLOCKED, "eval", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()
        assert done.stderr == b""
