"""Makes a model's text follow a JSON schema, a regular expression or a grammar, with llguidance.

Knows nothing about requests or sampling: a `Constraint` of the scheduler bans tokens
before one is chosen. What a token stands for is the detokenizer's word, so the text that a client
reads is the text that the grammar read.
"""

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from graphs.errors import UsageError
from runtime.decoding.sampling import Floats
from runtime.text.tokenizer import Tokenizer

# As `json.dumps` writes it. Free white space would let a small model write blanks without end.
LAYOUT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
QUOTED = 500  # characters of a reason, which may quote the whole grammar

# A grammar is a program of the client's: without bounds a small one ends the server. Seen with
# llguidance 1.9: 3,000 rules that name each the next (34 KB) overflow a stack of 8 MiB; `a?` 8,000
# times takes 1.4 s and 250 MB, and 32,000 times more than 10 s; 200 patterns of properties take
# 1 s, and 400 more than 8.
Kind = Literal["regular expression", "grammar", "JSON schema"]
LONGEST: dict[Kind, int] = {  # characters
    "regular expression": 1 << 12, "grammar": 1 << 14, "JSON schema": 1 << 16,
}  # fmt: skip
LONGEST_TEXT = 1 << 12  # of a schema's texts, which may be expressions
MOST_PATTERNS = 64  # of properties
STACK = 64 << 20  # bytes, of which only those are taken that are used
PATIENCE_S = 10.0  # for a grammar and those that came before it


class _Vocabulary:
    """A vocabulary of V tokens as llguidance asks for it; control tokens stand for no text."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.tokens = [tokenizer.bytes_of(token_id) for token_id in range(vocab_size)]
        self.special_token_ids = [i for i, data in enumerate(self.tokens) if not data]
        self.eos_token_id = min(tokenizer.stop_ids)
        self.bos_token_id = tokenizer.bos_id
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text, add_bos=False)


class Grammars:
    """Compiles grammars for one vocabulary, one at a time. Making it takes 0.2 s for 49,152 tokens.

    All raise UsageError for what is too long, or cannot be followed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        if not tokenizer.stop_ids:
            raise UsageError(
                "This model has no end-of-text token, so no grammar can end its text. Leave "
                "response_format, regex and grammar out."
            )
        self._tokenizer = LLTokenizer(
            TokenizerWrapper(_Vocabulary(tokenizer, vocab_size)),
            eos_token=sorted(tokenizer.stop_ids),
        )
        self._worker = _one_deep_thread()

    def json_schema(self, schema: dict[str, Any]) -> "GrammarConstraint":
        """Text that is JSON as `schema` wants it."""
        _check_schema(schema)
        try:
            text = json.dumps(schema)
        except RecursionError as error:
            raise UsageError("The JSON schema is nested too deep. Simplify it.") from error
        return self._compiled("JSON schema", text, _from_json_schema)

    def regex(self, pattern: str) -> "GrammarConstraint":
        """Text that matches `pattern` as a whole (the syntax of Rust's regex)."""
        return self._compiled("regular expression", pattern, LLMatcher.grammar_from_regex)

    def lark(self, grammar: str) -> "GrammarConstraint":
        """Text of a context-free grammar in Lark's syntax, from its rule `start`."""
        return self._compiled("grammar", grammar, LLMatcher.grammar_from_lark)

    def _compiled(self, kind: Kind, text: str, read: Callable[[str], str]) -> "GrammarConstraint":
        _check_length(kind, text)
        try:
            source = read(text)
        except ValueError as error:
            raise UsageError(
                f"The {kind} cannot be read ({error!s:.{QUOTED}}). Valid Unicode is expected."
            ) from error
        compiled = self._worker.submit(self._checked, kind, source)
        try:
            return compiled.result(PATIENCE_S)
        except TimeoutError as error:
            compiled.cancel()
            raise UsageError(
                f"The {kind} was not ready to be followed after {PATIENCE_S:g} s. Simplify it, or "
                "try again later if others were being read."
            ) from error

    def _checked(self, kind: Kind, source: str) -> "GrammarConstraint":
        failed, messages = LLMatcher.validate_grammar_with_warnings(source, self._tokenizer)
        matcher = LLMatcher(self._tokenizer, source, log_level=0)
        if failed or matcher.is_error():
            reason = messages[0] if failed else matcher.get_error()
            raise UsageError(
                f"The {kind} cannot be followed: {reason.strip()[:QUOTED]}. Leave out what is not "
                "supported, or simplify it."
            )
        return GrammarConstraint(matcher, self._tokenizer.vocab_size)


def _from_json_schema(text: str) -> str:
    source: str = LLMatcher.grammar_from_json_schema(text, overrides=LAYOUT)
    return source


def _one_deep_thread() -> ThreadPoolExecutor:
    """One thread with a stack of `STACK` bytes."""
    worker = ThreadPoolExecutor(1, "grammar")
    before = threading.stack_size(STACK)
    try:
        worker.submit(int).result()  # begins the thread; one that begins beside it is deep as well
    finally:
        threading.stack_size(before)
    return worker


def _check_length(kind: Kind, text: str) -> None:
    if len(text) > LONGEST[kind]:
        raise UsageError(
            f"The {kind} has {len(text):,} characters; up to {LONGEST[kind]:,} can be followed "
            "here. Simplify it."
        )


def _check_schema(schema: dict[str, Any]) -> None:
    """Raise UsageError for texts as long as no expression may be, and too many patterns."""
    patterns = 0
    for value in _parts(schema):
        if isinstance(value, str) and len(value) > LONGEST_TEXT:
            raise UsageError(
                f"The JSON schema has a text of {len(value):,} characters; up to {LONGEST_TEXT:,} "
                "can be followed here. Simplify it."
            )
        if isinstance(value, dict) and isinstance(found := value.get("patternProperties"), dict):
            patterns += len(found)
    if patterns > MOST_PATTERNS:
        raise UsageError(
            f"The JSON schema has {patterns} patternProperties; up to {MOST_PATTERNS} can be "
            "followed here. Simplify it."
        )


def _parts(schema: dict[str, Any]) -> Iterator[Any]:
    """Every value and every name in it."""
    left: list[Any] = [schema]
    while left:
        value = left.pop()
        yield value
        if isinstance(value, dict):
            left += [*value, *value.values()]
        elif isinstance(value, list):
            left += value


class GrammarConstraint:
    """Where one text stands in its grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size
        self._bits = np.zeros((vocab_size + 31) // 32, np.int32)  # a bit for each token

    def copies(self) -> Callable[[], "GrammarConstraint"]:
        """Makes fresh ones at the same place, without compiling again."""
        return lambda: GrammarConstraint(self._matcher.deep_copy(), self._vocab_size)

    def mask(self, logits: Floats) -> None:
        """Set what must not come next to -inf in `logits` [V]."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._raise_error()
        allowed = np.unpackbits(self._bits.view(np.uint8), bitorder="little")
        logits[allowed[: len(logits)] == 0] = -np.inf

    def accept(self, token_id: int) -> bool:
        """Note the token that came; True when the text is complete."""
        self._matcher.consume_token(token_id)
        self._raise_error()
        return self._matcher.is_stopped()

    def _raise_error(self) -> None:
        if self._matcher.is_error():
            reason, _, _state = self._matcher.get_error().strip().partition("\n")
            raise UsageError(
                f"The grammar cannot be followed further: {reason[:QUOTED]}. Simplify the schema "
                "or the grammar."
            )
