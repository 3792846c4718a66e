"""Makes a model's text follow a JSON schema, a regular expression or a grammar, with llguidance.

Knows nothing about requests or sampling: a `Constraint` of `runtime.scheduler` bans tokens before
one is chosen. What a token stands for is the detokenizer's word, so the text that a client reads is
the text that the grammar read.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from graphs.errors import MistralcError, UsageError
from runtime.sampling import Floats
from runtime.tokenizer import Tokenizer

# As `json.dumps` writes it. Free white space would let a small model write blanks without end.
LAYOUT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
QUOTED = 500  # characters of a reason, which may quote the whole grammar


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
    """Compiles grammars for one vocabulary. Making it takes 0.2 s for 49,152 tokens."""

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

    def json_schema(self, schema: dict[str, Any]) -> "GrammarConstraint":
        """Text that is JSON as `schema` wants it. Raises UsageError for what it cannot hold to."""
        source = LLMatcher.grammar_from_json_schema(schema, overrides=LAYOUT)
        return self._checked(source, "JSON schema")

    def regex(self, pattern: str) -> "GrammarConstraint":
        """Text that matches `pattern` as a whole (the syntax of Rust's regex)."""
        return self._checked(LLMatcher.grammar_from_regex(pattern), "regular expression")

    def lark(self, grammar: str) -> "GrammarConstraint":
        """Text of a context-free grammar in Lark's syntax, from its rule `start`."""
        return self._checked(LLMatcher.grammar_from_lark(grammar), "grammar")

    def _checked(self, source: str, what: str) -> "GrammarConstraint":
        failed, messages = LLMatcher.validate_grammar_with_warnings(source, self._tokenizer)
        matcher = LLMatcher(self._tokenizer, source, log_level=0)
        if failed or matcher.is_error():
            reason = messages[0] if failed else matcher.get_error()
            raise UsageError(
                f"The {what} cannot be followed: {reason.strip()[:QUOTED]}. Leave out what is not "
                "supported, or simplify it."
            )
        return GrammarConstraint(matcher, self._tokenizer.vocab_size)


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
            raise MistralcError(
                f"The grammar could not be followed further: {self._matcher.get_error().strip()}. "
                "Simplify the schema or the grammar."
            )
