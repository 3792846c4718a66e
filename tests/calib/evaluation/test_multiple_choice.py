"""Multiple-choice questions: scores of continuations, token ids, accuracy, the file format."""

import json
import math
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
    encode_choices,
    measure_accuracy,
    read_questions,
)
from exporter.tokenizer.read import read_tokenizer
from graphs.errors import MistralcError
from graphs.spec import ModelSpec
from runtime.decoding.ring import ContextFullError
from runtime.text.tokenizer import Tokenizer
from tests.calib.evaluation.samples import GOOD_QUESTION, PLAIN, SLIDING, build_of, log_softmax
from tests.support import tiny


@pytest.fixture(scope="module")
def tokenizer(plain_checkpoint: Path) -> Tokenizer:
    return read_tokenizer(plain_checkpoint).open()


def by_hand(spec: ModelSpec, ids: list[int], start: int) -> tuple[float, bool]:
    logits = log_softmax(tiny.at_once(tiny.decoder(spec), np.array(ids)))[start - 1 : -1]
    found = np.take_along_axis(logits, np.array(ids)[start:, None], -1)
    return float(found.sum()), bool((logits.argmax(-1) == ids[start:]).all())


@pytest.mark.parametrize("spec", [SLIDING, PLAIN], ids=["sliding", "plain"])
def test_continuations_score_as_in_one_pass_whatever_was_scored_before(spec: ModelSpec):
    """Cases: shared prefixes, rewinds within and beyond a ring's slack, unrelated texts."""
    scorer = Scorer(tiny.session(spec), build_of(spec))
    text = tiny.tokens(spec, 60).tolist()
    cases = [(text[:40], 20), (text[:40], 39), ([*text[:39], 7], 39), ([*text[:38], 3, 4], 38),
             ([*text[:21], 9, 9, 9], 21), (text, 58), (text[30:50], 1), (text[:5], 5)]  # fmt: skip
    for ids, start in cases:
        found = scorer.score(ids, start)
        log, greedy = by_hand(spec, ids, start)
        # Up to 20 log-probabilities of float32 logits of about 1, each within 1e-6.
        assert found.log == pytest.approx(log, abs=2e-5)
        assert found.greedy == greedy


def test_a_continuation_is_greedy_exactly_if_the_model_would_generate_it():
    scorer, ids = Scorer(tiny.session(PLAIN), build_of(PLAIN)), tiny.tokens(PLAIN, 6).tolist()
    for _ in range(5):
        ids.append(int(tiny.at_once(tiny.decoder(PLAIN), np.array(ids))[-1].argmax()))
    assert scorer.score(ids, 6).greedy
    assert not scorer.score([*ids[:-1], (ids[-1] + 1) % PLAIN.vocab_size], 6).greedy


def test_scores_are_bit_identical_for_any_order_of_choices():
    prompt = tiny.tokens(SLIDING, 30).tolist()
    choices = [[*prompt, 5], [*prompt, 6, 7], [*prompt, 8]]
    found = []
    for order in (choices, choices[::-1]):
        scorer = Scorer(tiny.session(SLIDING), build_of(SLIDING))
        found.append([scorer.score(ids, len(prompt)).log for ids in order])
    assert found[0] == found[1][::-1]


def test_a_text_longer_than_the_context_is_refused():
    scorer = Scorer(tiny.session(PLAIN), build_of(PLAIN, context=20))
    assert scorer.longest == 21
    scorer.score([5] * 21, 3)
    with pytest.raises(ContextFullError, match="holds 20 in all"):
        scorer.score([5] * 22, 3)
    assert Scorer(tiny.session(SLIDING), build_of(SLIDING)).longest is None


def question(context: str, *choices: str, answer: int = 0) -> Question:
    return Question(context=context, choices=choices, answer=answer)


def test_one_space_joins_context_and_choice_unless_there_is_white_space(tokenizer: Tokenizer):
    for context, choice, expected in [
        ("The sky is", "blue", "The sky is blue"),
        ("The sky is", " blue", "The sky is blue"),
        ("The sky is\n", "blue", "The sky is\nblue"),
        ("", "blue", "blue"),
    ]:
        wholes, start = encode_choices(question(context, choice, "red"), tokenizer)
        assert tokenizer.decode(wholes[0]) == expected
        assert start == 1 + len(context), "the BOS, and a token for each byte of the context"


def test_a_choice_without_context_follows_a_bos(plain_checkpoint: Path):
    files = read_tokenizer(plain_checkpoint)

    def opened(**settings: Any) -> Tokenizer:
        return replace(files, tokenizer_config=files.tokenizer_config | settings).open()

    for settings, first in (({}, 1), ({"bos_token_id": None}, 2)):
        wholes, start = encode_choices(
            question("", "a", "b"), opened(add_bos_token=False, **settings)
        )
        assert start == 1
        assert [len(ids) for ids in wholes] == [2, 2]
        assert {ids[0] for ids in wholes} == {first}
    stranger = replace(files, tokenizer_config={}, generation_config={}).open()
    with pytest.raises(MistralcError, match="neither a BOS nor an end of text"):
        encode_choices(question("", "a", "b"), stranger)


def test_a_choice_that_merges_with_its_context_is_scored_from_the_merged_token():
    vocabulary = {"b": 0, "c": 1, "Ġ": 2, "Ġb": 3}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[("Ġ", "b")]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    merging = Tokenizer(backend, {}, {})
    assert encode_choices(question("c ", "c", "cc"), merging) == ([[1, 2, 1], [1, 2, 1, 1]], 2)
    assert encode_choices(question("c ", "c", "b"), merging) == ([[1, 2, 1], [1, 3]], 1), (
        "for both alike"
    )


def right_answers(
    spec: ModelSpec, tokenizer: Tokenizer, questions: list[Question]
) -> tuple[list[int], list[int]]:
    """Return the most likely choice of each question, and the most likely per character."""
    plain, normalized = [], []
    for asked in questions:
        wholes, start = encode_choices(asked, tokenizer)
        logs = [by_hand(spec, ids, start)[0] for ids in wholes]
        plain.append(int(np.argmax(logs)))
        normalized.append(int(np.argmax([
            log / len(choice) for log, choice in zip(logs, asked.choices, strict=True)
        ])))  # fmt: skip
    return plain, normalized


def test_accuracy_counts_the_likeliest_choice_and_the_likeliest_per_character(tokenizer: Tokenizer):
    questions = [
        question("The ring turns", "a", "bc de", "fghijklmno"), question("Zwei", "drei", "4"),
        question("Once", "upon a time", "more"), question("", "ja", "no"), question("x ", "y", "z"),
    ]  # fmt: skip
    plain, normalized = right_answers(PLAIN, tokenizer, questions)
    assert plain != normalized, "length has to change at least one answer"
    counted: list[int] = []
    asked = [replace(q, answer=at) for q, at in zip(questions, plain, strict=True)]
    session, build = tiny.session(PLAIN), build_of(PLAIN)
    found = measure_accuracy(session, build, tokenizer, asked, counted.append)
    agreed = sum(a == b for a, b in zip(plain, normalized, strict=True))
    assert (found.accuracy, found.normalized) == (1, agreed / 5)
    assert len(counted) == 5
    asked = [replace(q, answer=at) for q, at in zip(questions, normalized, strict=True)]
    found = measure_accuracy(session, build, tokenizer, asked)
    assert (found.accuracy, found.normalized) == (agreed / 5, 1)


def test_the_standard_error_is_that_of_the_mean_of_zeros_and_ones():
    found = Accuracy(questions=10, accuracy=0.3, normalized=1.0)
    drawn = np.array([1] * 3 + [0] * 7)
    expected = drawn.std(ddof=1) / math.sqrt(10)
    assert found.accuracy_stderr == pytest.approx(expected, rel=1e-12)  # rounding of float64
    assert found.normalized_stderr == 0
    assert "| 10 | 30.00% ± 15.28% | 100.00% ± 0.00% |" in found.to_markdown()
    alone = Accuracy(questions=1, accuracy=1.0, normalized=0.0)
    assert alone.to_json()["accuracy_stderr"] is None
    assert "| 1 | 100.00% | 0.00% |" in alone.to_markdown()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({"choices": ["4", "5"], "answer": 0}, "has no text in either of `question`"),
        (GOOD_QUESTION | {"context": "also"}, "has both `question` and `context`"),
        (GOOD_QUESTION | {"question": 4}, "has no text in either of `question`"),
        (GOOD_QUESTION | {"choices": ["4"]}, "does not have two or more texts"),
        (GOOD_QUESTION | {"choices": ["4", ""]}, "does not have two or more texts"),
        (GOOD_QUESTION | {"choices": ["4", 5]}, "does not have two or more texts"),
        (GOOD_QUESTION | {"choices": "45"}, "does not have two or more texts"),
        (GOOD_QUESTION | {"choices": None}, "does not have two or more texts"),
        (GOOD_QUESTION | {"answer": 2}, "has the answer 2 to 2 choices"),
        (GOOD_QUESTION | {"answer": -1}, "has the answer -1"),
        (GOOD_QUESTION | {"answer": "4"}, "has the answer '4'"),
        (GOOD_QUESTION | {"answer": True}, "has the answer True"),
        (GOOD_QUESTION | {"answer": None}, "has the answer None"),
    ],
)
def test_a_line_that_is_not_a_question_is_named_in_the_error(
    line: dict[str, Any], expected: str, tmp_path: Path
):
    file = tmp_path / "task.jsonl"
    file.write_text(json.dumps(GOOD_QUESTION) + "\n" + json.dumps(line) + "\n", encoding="utf-8")
    with pytest.raises(
        MistralcError, match=r"task.jsonl, line 2 .* expected one object per line"
    ) as refused:
        read_questions(file)
    assert expected in str(refused.value)
