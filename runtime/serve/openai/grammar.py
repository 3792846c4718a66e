"""Make text follow a JSON schema, a regular expression or a grammar, with llguidance.

Knows nothing about requests or sampling: as a `Constraint` of the scheduler it masks the logits
before sampling. The bytes of each token come from the detokenizer, so the grammar reads the same
text as the client.
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

# JSON as `json.dumps` writes it. With free white space a small model may write blanks forever.
JSON_LAYOUT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
MAX_QUOTED = 500  # characters of an error, which may quote the whole grammar

# A grammar is a program from the client, and without limits a small one can kill the server. Seen
# with llguidance 1.9: 3,000 rules that each name the next (34 KB) overflow a stack of 8 MiB; `a?`
# 8,000 times takes 1.4 s and 250 MB, and 32,000 times more than 10 s; 200 patternProperties take
# 1 s, and 400 more than 8 s.
Kind = Literal["regular expression", "grammar", "JSON schema"]
MAX_LENGTH: dict[Kind, int] = {  # characters
    "regular expression": 1 << 12, "grammar": 1 << 14, "JSON schema": 1 << 16,
}  # fmt: skip
MAX_STRING = 1 << 12  # characters of a string in a schema, which may be an expression
MAX_PATTERNS = 64  # patternProperties in a schema
STACK_BYTES = 64 << 20  # virtual; only pages in use take memory
TIMEOUT_S = 10.0  # for compiling a grammar and those queued before it


class _Vocabulary:
    """A vocabulary of V tokens in the form llguidance expects; control tokens have no text."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.tokens = [tokenizer.bytes_of(token_id) for token_id in range(vocab_size)]
        self.special_token_ids = [i for i, data in enumerate(self.tokens) if not data]
        self.eos_token_id = min(tokenizer.stop_ids)
        self.bos_token_id = tokenizer.bos_id
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text, add_bos=False)


class Grammars:
    """Compiles grammars for one vocabulary, one at a time. Creating it takes 0.2 s for V = 49,152.

    All methods raise UsageError if the grammar is too long, not valid or not supported.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        if not tokenizer.stop_ids:
            raise UsageError(
                "This model has no end-of-text token, so a grammar cannot end its text. Leave "
                "response_format, regex and grammar out."
            )
        self._tokenizer = LLTokenizer(
            TokenizerWrapper(_Vocabulary(tokenizer, vocab_size)),
            eos_token=sorted(tokenizer.stop_ids),
        )
        self._worker = _one_deep_thread()

    def json_schema(self, schema: dict[str, Any]) -> "GrammarConstraint":
        """Compile a JSON schema."""
        _check_schema(schema)
        try:
            text = json.dumps(schema)
        except RecursionError as error:
            raise UsageError("The JSON schema is nested too deep. Simplify it.") from error
        return self._compile("JSON schema", text, _from_json_schema)

    def regex(self, pattern: str) -> "GrammarConstraint":
        """Compile a regular expression (syntax of Rust's regex) for the whole text."""
        return self._compile("regular expression", pattern, LLMatcher.grammar_from_regex)

    def lark(self, grammar: str) -> "GrammarConstraint":
        """Compile a context-free grammar in Lark's syntax, with the start rule `start`."""
        return self._compile("grammar", grammar, LLMatcher.grammar_from_lark)

    def _compile(self, kind: Kind, text: str, read: Callable[[str], str]) -> "GrammarConstraint":
        _check_length(kind, text)
        try:
            source = read(text)
        except ValueError as error:
            raise UsageError(
                f"The {kind} cannot be read ({error!s:.{MAX_QUOTED}}). Valid Unicode is expected."
            ) from error
        compiled = self._worker.submit(self._validated, kind, source)
        try:
            return compiled.result(TIMEOUT_S)
        except TimeoutError as error:
            compiled.cancel()
            raise UsageError(
                f"The {kind} was not compiled after {TIMEOUT_S:g} s. Simplify it, or try again "
                "later if others were being compiled."
            ) from error

    def _validated(self, kind: Kind, source: str) -> "GrammarConstraint":
        failed, messages = LLMatcher.validate_grammar_with_warnings(source, self._tokenizer)
        matcher = LLMatcher(self._tokenizer, source, log_level=0)
        if failed or matcher.is_error():
            reason = messages[0] if failed else matcher.get_error()
            raise UsageError(
                f"The {kind} cannot be followed: {reason.strip()[:MAX_QUOTED]}. Leave out what is "
                "not supported, or simplify it."
            )
        return GrammarConstraint(matcher, self._tokenizer.vocab_size)


def _from_json_schema(text: str) -> str:
    source: str = LLMatcher.grammar_from_json_schema(text, overrides=JSON_LAYOUT)
    return source


def _one_deep_thread() -> ThreadPoolExecutor:
    """Return a pool of one thread with a stack of `STACK_BYTES`."""
    worker = ThreadPoolExecutor(1, "grammar")
    before = threading.stack_size(STACK_BYTES)
    try:
        worker.submit(
            int
        ).result()  # starts the thread; others started meanwhile get this stack too
    finally:
        threading.stack_size(before)
    return worker


def _check_length(kind: Kind, text: str) -> None:
    if len(text) > MAX_LENGTH[kind]:
        raise UsageError(
            f"The {kind} has {len(text):,} characters; up to {MAX_LENGTH[kind]:,} are "
            "allowed here. Simplify it."
        )


def _check_schema(schema: dict[str, Any]) -> None:
    """Raise UsageError if a string is too long or there are too many patternProperties."""
    patterns = 0
    for value in _parts(schema):
        if isinstance(value, str) and len(value) > MAX_STRING:
            raise UsageError(
                f"The JSON schema has a string of {len(value):,} characters; up to {MAX_STRING:,} "
                "are allowed here. Simplify it."
            )
        if isinstance(value, dict) and isinstance(found := value.get("patternProperties"), dict):
            patterns += len(found)
    if patterns > MAX_PATTERNS:
        raise UsageError(
            f"The JSON schema has {patterns} patternProperties; up to {MAX_PATTERNS} are "
            "allowed here. Simplify it."
        )


def _parts(schema: dict[str, Any]) -> Iterator[Any]:
    """Yield every value and every name in a schema."""
    left: list[Any] = [schema]
    while left:
        value = left.pop()
        yield value
        if isinstance(value, dict):
            left += [*value, *value.values()]
        elif isinstance(value, list):
            left += value


class GrammarConstraint:
    """The state of one text in its grammar; a `Constraint` of the scheduler."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size
        self._bits = np.zeros((vocab_size + 31) // 32, np.int32)  # a bit for each token

    def copies(self) -> Callable[[], "GrammarConstraint"]:
        """Return a function that makes copies in the same state, without compiling again."""
        return lambda: GrammarConstraint(self._matcher.deep_copy(), self._vocab_size)

    def mask(self, logits: Floats) -> None:
        """Set the `logits` [V] of tokens that must not come next to -inf."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._raise_error()
        allowed = np.unpackbits(self._bits.view(np.uint8), bitorder="little")
        logits[allowed[: len(logits)] == 0] = -np.inf

    def accept(self, token_id: int) -> bool:
        """Take the next token; True if the text is now complete and must end."""
        self._matcher.consume_token(token_id)
        self._raise_error()
        return self._matcher.is_stopped()

    def _raise_error(self) -> None:
        if self._matcher.is_error():
            reason, _, _state = self._matcher.get_error().strip().partition("\n")
            raise UsageError(
                f"The grammar cannot be followed further: {reason[:MAX_QUOTED]}. Simplify the "
                "schema or the grammar."
            )
