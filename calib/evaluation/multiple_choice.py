"""Answer multiple-choice questions by likelihood. Knows nothing about any particular task.

Each choice is appended to the context and scored by the log-likelihood of its tokens; the most
likely choice is the answer. MMLU, HellaSwag and ARC are scored like this. The file holds the prompt
exactly as the model reads it: at most one space is added.
"""

import math
from collections import abc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporter.checks.corpus import objects, read_text
from graphs.build import Build
from graphs.errors import MistralcError
from runtime.backends.session import Session
from runtime.decoding.sequence import Sequence
from runtime.load import make_ring
from runtime.measure.perplexity import Progress, check_ids, log_likelihoods
from runtime.text.tokenizer import Tokenizer

EXPECTED = (
    'expected one object per line, {"question": "…", "choices": ["…", "…"], "answer": 0}, '
    "with `answer` counted from 0; `context` may replace `question`"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A text, at least two continuations, and the index of the right one, from 0."""

    context: str
    choices: tuple[str, ...]
    answer: int
    where: str = ""  # file and line, for errors


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """The share of `questions` answered correctly, 0 to 1.

    `normalized` divides each log-likelihood by the number of characters of its choice, so that long
    choices are not at a disadvantage. The standard errors are those of a sample mean.
    """

    questions: int
    accuracy: float
    normalized: float

    @property
    def accuracy_stderr(self) -> float | None:
        """Standard error of `accuracy`; None for a single question."""
        return _standard_error(self.accuracy, self.questions)

    @property
    def normalized_stderr(self) -> float | None:
        """Standard error of `normalized`; None for a single question."""
        return _standard_error(self.normalized, self.questions)

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain data."""
        return {
            "questions": self.questions,
            "accuracy": self.accuracy,
            "accuracy_stderr": self.accuracy_stderr,
            "normalized_accuracy": self.normalized,
            "normalized_accuracy_stderr": self.normalized_stderr,
        }

    def to_markdown(self) -> str:
        """Return a Markdown table of one row."""
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
    """Natural log-likelihood of a continuation, and whether greedy decoding produces it."""

    log: float
    greedy: bool


class Scorer:
    """Scores continuations, reusing the ring for the prefix that a text shares with the last one.

    No one else may step the session while a Scorer uses it.
    """

    def __init__(self, session: Session, build: Build) -> None:
        self.build, self.ring = build, make_ring(build)
        self._sequence = Sequence(session, self.ring)
        self._seen: list[int] = []  # ids in the ring

    @property
    def longest(self) -> int | None:
        """Most tokens of a text, continuation included; None for a sliding window."""
        spec, context = self.build.spec, self.build.ring.context
        return None if spec.slides else context + 1  # the last token is never fed

    def score(self, ids: abc.Sequence[int], start: int) -> Likelihood:
        """Score the tokens of `ids` from index `start` (at least 1) on, given those before.

        Raises ContextFullError if the bundle has no room for them, and MistralcError if its logits
        are not finite.
        """
        array = np.asarray(ids, np.int64)
        check_ids(self.build, array)
        common = self._common(ids[: start - 1])
        self.ring.check_room_from(common, len(ids) - 1 - common)
        self.ring.rewind(common)
        del self._seen[common:]
        # The context is fed first and by itself, so that all choices of a question see the same
        # keys, whichever is scored first.
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
                "The bundle's logits hold NaN or infinity; expected finite numbers. Run "
                "`mistralc verify` on the bundle, and report this with its manifest."
            )
        return Likelihood(log=log, greedy=greedy)

    def _common(self, ids: abc.Sequence[int]) -> int:
        """Count the leading `ids` that are in the ring and that it can rewind to."""
        common = common_prefix(self._seen, ids)
        return common if common >= self.ring.oldest_rewind() else 0


def read_questions(path: Path) -> list[Question]:
    """Read a JSONL file of questions. Raises MistralcError naming the line that is not one."""
    found = [_question(line, where) for where, line in objects(read_text(path), path)]
    if not found:
        raise MistralcError(f"{path} holds no questions; {EXPECTED}. Check the path.")
    return found


def measure_accuracy(
    session: Session,
    build: Build,
    tokenizer: Tokenizer,
    questions: abc.Sequence[Question],
    progress: Progress | None = None,
) -> Accuracy:
    """Answer all `questions`, counted by `progress`. Of equally likely choices the first wins."""
    scorer = Scorer(session, build)
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


def encode_choices(question: Question, tokenizer: Tokenizer) -> tuple[list[list[int]], int]:
    """Return the ids of context plus choice, for each choice, and the first index to score.

    A space joins the two unless one of them has white space there. If the tokenizer merges the end
    of the context with the start of a choice, all choices are scored from that token on, so that
    the compared likelihoods always follow the same tokens.
    """
    texts = [_join(question.context, choice) for choice in question.choices]
    wholes = [tokenizer.encode(text) for text in texts]
    context = tokenizer.encode(question.context)
    start = min(common_prefix(context, whole) for whole in wholes)
    if start:
        return wholes, start
    first = prefix_id(tokenizer)
    return [[first, *whole] for whole in wholes], 1


def prefix_id(tokenizer: Tokenizer) -> int:
    """Return the token to place before a text without context: the BOS, else an end of text."""
    if tokenizer.bos_id is not None:
        return tokenizer.bos_id
    if tokenizer.stop_ids:
        return min(tokenizer.stop_ids)
    raise MistralcError(
        "The bundle's tokenizer names neither a BOS nor an end of text; expected one of them to "
        "score the first token of a text. Give each question some context."
    )


def common_prefix(one: abc.Sequence[int], other: abc.Sequence[int]) -> int:
    """Return the length of the common prefix of two texts, in tokens."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _log_likelihoods(scorer: Scorer, tokenizer: Tokenizer, question: Question) -> list[float]:
    texts, start = encode_choices(question, tokenizer)
    return [scorer.score(ids, start).log for ids in texts]


def _join(context: str, choice: str) -> str:
    spaced = not context or context[-1].isspace() or choice[0].isspace()
    return context + ("" if spaced else " ") + choice


def _question(line: dict[str, Any], where: str) -> Question:
    contexts = [line[name] for name in ("question", "context") if name in line]
    if len(contexts) != 1 or not isinstance(contexts[0], str):
        got = "both" if len(contexts) == 2 else "no text in either of"
        raise MistralcError(f"{where} has {got} `question` and `context`; {EXPECTED}.")
    choices, answer = line.get("choices"), line.get("answer")
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(choice, str) and choice for choice in choices)
    ):
        raise MistralcError(f"{where} does not have two or more texts as `choices`; {EXPECTED}.")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise MistralcError(
            f"{where} has the answer {answer!r:.40} to {len(choices)} choices; {EXPECTED}."
        )
    return Question(context=contexts[0], choices=tuple(choices), answer=answer, where=where)


def _standard_error(share: float, count: int) -> float | None:
    return math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None


def _with_error(share: float, error: float | None) -> str:
    return f"{share:.2%}" if error is None else f"{share:.2%} ± {error:.2%}"
