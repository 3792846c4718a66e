"""Multiple-choice questions, answered by likelihood. Knows nothing about any particular task.

A choice is put after its context and scored by the log-likelihood of its tokens; the likeliest
choice is the answer. That is how MMLU, HellaSwag and ARC are scored, and the file has the prompt
as the model is to see it: nothing but a space is added.
"""

import math
from collections import abc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporter.checks.corpus import objects, read_text
from graphs.errors import MistralcError
from graphs.manifest import Manifest
from runtime.backends.session import Session
from runtime.decoding.sequence import Sequence
from runtime.load import make_ring
from runtime.measure.perplexity import Progress, check_ids, log_likelihoods
from runtime.text.tokenizer import Tokenizer

EXPECTED = (
    'one object on each line is expected, {"question": "…", "choices": ["…", "…"], "answer": 0}, '
    "with `answer` counting from 0 and `context` in place of `question` where that says it better"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Text, at least two continuations of it, and which of them is right, counted from 0."""

    context: str
    choices: tuple[str, ...]
    answer: int
    where: str = ""  # file and line, for errors


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """How many of `questions` were answered rightly, as shares.

    `normalized` divides each log-likelihood by the number of characters of its choice, so that
    long ones are not at a disadvantage. The standard errors are those of a sample's mean.
    """

    questions: int
    accuracy: float
    normalized: float

    @property
    def accuracy_stderr(self) -> float | None:
        """Standard error of `accuracy`; None of a single question."""
        return _standard_error(self.accuracy, self.questions)

    @property
    def normalized_stderr(self) -> float | None:
        """Standard error of `normalized`; None of a single question."""
        return _standard_error(self.normalized, self.questions)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "questions": self.questions,
            "accuracy": self.accuracy,
            "accuracy_stderr": self.accuracy_stderr,
            "normalized_accuracy": self.normalized,
            "normalized_accuracy_stderr": self.normalized_stderr,
        }

    def to_markdown(self) -> str:
        """A table of one row."""
        plain = _with_error(self.accuracy, self.accuracy_stderr)
        normalized = _with_error(self.normalized, self.normalized_stderr)
        return "\n".join([
            "| questions | accuracy | length-normalized |",
            "| ---: | ---: | ---: |",
            f"| {self.questions:,} | {plain} | {normalized} |",
            "",
        ])  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Likelihood:
    """Natural log-likelihood of a continuation, and whether greedy decoding would write it."""

    log: float
    greedy: bool


class Scorer:
    """Scores continuations on a live ring; what a text shares with the last one is not read again.

    It has the session to itself: another reader of the same ring makes it a stranger to it.
    """

    def __init__(self, session: Session, manifest: Manifest) -> None:
        self.manifest, self.ring = manifest, make_ring(manifest.build)
        self._sequence = Sequence(session, self.ring)
        self._seen: list[int] = []  # what the ring holds

    @property
    def longest(self) -> int | None:
        """Most tokens of a text, continuation included; None where the model slides."""
        spec, context = self.manifest.model, self.manifest.ring.context
        return None if spec.slides else context + 1  # the last one is never fed

    def score(self, ids: abc.Sequence[int], start: int) -> Likelihood:
        """Score the tokens of `ids` from index `start` (at least 1) on, given those before it.

        Raises ContextFullError where the bundle has no room for them.
        """
        array = np.asarray(ids, np.int64)
        check_ids(self.manifest.build, array)
        common = self._common(ids[: start - 1])
        self.ring.check_room_from(common, len(ids) - 1 - common)
        self.ring.rewind(common)
        del self._seen[common:]
        # The context first and by itself, so that every choice of a question meets the same keys,
        # whichever of them was scored first.
        context, continuation = array[common : start - 1], array[start - 1 :]
        for _ in self._sequence.feed(context):
            pass
        log, greedy = 0.0, True
        fed = continuation[:-1]
        for start, count, logits in self._sequence.feed(fed, np.arange(len(fed))):
            targets = continuation[start + 1 : start + 1 + count]
            log += float(log_likelihoods(logits, targets).sum())
            greedy &= bool((logits.argmax(-1) == targets).all())
        self._seen += ids[common:-1]
        if not math.isfinite(log):
            raise MistralcError(
                "The bundle's logits hold NaN or infinity; finite numbers are expected. Run "
                "`mistralc verify` on the bundle, and report this with its manifest."
            )
        return Likelihood(log=log, greedy=greedy)

    def _common(self, ids: abc.Sequence[int]) -> int:
        """How many of `ids` the ring holds already and can go back to."""
        common = shared(self._seen, ids)
        return common if common >= self.ring.oldest_rewind() else 0


def read_questions(path: Path) -> list[Question]:
    """Read a JSONL file of questions; raises MistralcError naming the line that is none."""
    found = [_question(line, where) for where, line in objects(read_text(path), path)]
    if not found:
        raise MistralcError(f"{path} holds no question; {EXPECTED}. Check the path.")
    return found


def measure(
    session: Session,
    manifest: Manifest,
    tokenizer: Tokenizer,
    questions: abc.Sequence[Question],
    progress: Progress | None = None,
) -> Accuracy:
    """Answer all `questions`; `progress` counts them. Of equal choices the first is taken."""
    scorer = Scorer(session, manifest)
    right, right_normalized = 0, 0
    for question in questions:
        try:
            logs = np.array(_log_likelihoods(scorer, tokenizer, question))  # [choices]
        except MistralcError as error:
            raise type(error)(f"{question.where}: {error}") from error
        lengths = np.array([len(choice) for choice in question.choices])
        right += int(logs.argmax()) == question.answer
        right_normalized += int((logs / lengths).argmax()) == question.answer
        if progress is not None:
            progress(1)
    count = len(questions)
    return Accuracy(questions=count, accuracy=right / count, normalized=right_normalized / count)


def encode(question: Question, tokenizer: Tokenizer) -> tuple[list[list[int]], int]:
    """Ids of context and choice for each choice, and the index of the first token to score.

    A space stands between the two unless one of them has white space there. Where a choice merges
    with the end of the context into a token of its own, all choices are scored from that token on:
    what is compared is always the likelihood of whole texts after the same tokens.
    """
    texts = [_join(question.context, choice) for choice in question.choices]
    wholes = [tokenizer.encode(text) for text in texts]
    context = tokenizer.encode(question.context)
    start = min(shared(context, whole) for whole in wholes)
    if start:
        return wholes, start
    first = prefix_id(tokenizer)
    return [[first, *whole] for whole in wholes], 1


def prefix_id(tokenizer: Tokenizer) -> int:
    """The token for a text to follow that has nothing before it: the BOS, else an end of text."""
    if tokenizer.bos_id is not None:
        return tokenizer.bos_id
    if tokenizer.stop_ids:
        return min(tokenizer.stop_ids)
    raise MistralcError(
        "The bundle's tokenizer names neither a BOS nor an end of text; one of them is "
        "expected before a text whose first token is to be scored. Give each question some context."
    )


def shared(one: abc.Sequence[int], other: abc.Sequence[int]) -> int:
    """How many ids two texts have in common at the front."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _log_likelihoods(scorer: Scorer, tokenizer: Tokenizer, question: Question) -> list[float]:
    texts, start = encode(question, tokenizer)
    return [scorer.score(ids, start).log for ids in texts]


def _join(context: str, choice: str) -> str:
    spaced = not context or context[-1].isspace() or choice[0].isspace()
    return context + ("" if spaced else " ") + choice


def _question(line: dict[str, Any], where: str) -> Question:
    contexts = [line[name] for name in ("question", "context") if name in line]
    if len(contexts) != 1 or not isinstance(contexts[0], str):
        got = "both of them" if len(contexts) == 2 else "no text in either"
        raise MistralcError(f"{where} has {got}, `question` and `context`; {EXPECTED}.")
    choices, answer = line.get("choices"), line.get("answer")
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(choice, str) and choice for choice in choices)
    ):
        raise MistralcError(f"{where} has no two or more texts as its `choices`; {EXPECTED}.")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise MistralcError(
            f"{where} has the answer {answer!r:.40} to {len(choices)} choices; {EXPECTED}."
        )
    return Question(context=contexts[0], choices=tuple(choices), answer=answer, where=where)


def _standard_error(share: float, count: int) -> float | None:
    return math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None


def _with_error(share: float, error: float | None) -> str:
    return f"{share:.2%}" if error is None else f"{share:.2%} ± {error:.2%}"
