"""Complete a prompt with text, and time it. Knows nothing about backends.

feed the prompt ──▶ sample ──▶ detokenize ──▶ hold back what may be a stop string ──▶ text
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

from runtime.decoding.generator import FinishReason, Generator, Progress
from runtime.decoding.sampling import Floats, Sampled, SamplingParams
from runtime.text.stop_strings import StopStrings
from runtime.text.text_stream import TextStream
from runtime.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Token counts and times of one completion, in seconds.

    `ttft` is the time to first token, prompt included. `cached_tokens` of the prompt were in the
    ring already and were not computed. Decode speed counts the steps after the first token: n
    tokens take n - 1 steps.
    """

    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    ttft: float
    decode: float

    @property
    def prefill_rate(self) -> float | None:
        """Prompt tokens per second, or None if all were cached."""
        fed = self.prompt_tokens - self.cached_tokens
        return fed / self.ttft if fed and self.ttft else None

    @property
    def decode_rate(self) -> float | None:
        """Generated tokens per second after the first, or None if there was only one."""
        return (self.new_tokens - 1) / self.decode if self.new_tokens > 1 and self.decode else None

    def to_json(self) -> dict[str, Any]:
        """Return plain data for JSON, with units in the names."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "new_tokens": self.new_tokens,
            "ttft_s": self.ttft,
            "decode_s": self.decode,
            "prefill_tokens_per_s": self.prefill_rate,
            "decode_tokens_per_s": self.decode_rate,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of one completion, beside the model's own end-of-text token.

    `speculate` is the largest number of tokens to draft ahead. Raises UsageError if a stop string
    is empty.
    """

    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    speculate: int = 0

    def __post_init__(self) -> None:
        StopStrings(self.stop)  # raises before any work is done


class Completion:
    """One completion. Iterate over it for its text; then read how it ended.

    `tokens` are the sampled ids, the end-of-text token included, four bytes each. `logprobs` is
    filled only if `params` asks for log-probabilities. `chat` drops the space that SentencePiece
    puts before the first word: it belongs to text that continues a prompt, not to an answer.
    """

    def __init__(
        self,
        generator: Generator,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        params: SamplingParams,
        limits: Limits,
        *,
        chat: bool = False,
    ) -> None:
        self.generator, self.tokenizer = generator, tokenizer
        self.prompt, self.params, self.limits = prompt, params, limits
        self.tokens = array("i")
        self.logprobs: list[Sampled] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.timings: Timings | None = None
        self._chat = chat
        self._began = 0.0
        self._logits: Floats | None = None

    def prefill(self, progress: Progress | None = None) -> Floats:
        """Feed the part of the prompt that the ring does not hold; returns the last logits [V].

        Iterating calls this if it was not called before.
        """
        self._began = perf_counter()
        self._logits = self.generator.feed_from_common_prefix(self.prompt, progress)
        return self._logits

    def __iter__(self) -> Iterator[str]:
        """Yield the text as soon as it can be sent; never part of a character."""
        stream = TextStream(self.tokenizer, self.limits.stop, continuation=not self._chat)
        logits = self.prefill() if self._logits is None else self._logits
        cached = self.generator.fed_from
        sampled = self.generator.generate(
            logits,
            self.params,
            max_new_tokens=self.limits.max_new_tokens,
            stop_ids=self.tokenizer.stop_ids,
            speculate=self.limits.speculate,
        )
        first = None
        for token in sampled:
            first = first or perf_counter()
            self.tokens.append(token.token_id)
            if self.params.logprobs is not None:
                self.logprobs.append(token)
            yield from self._emit(stream.push(token.token_id))
            if stream.stopped:
                break
        else:
            yield from self._emit(stream.finish())
        ended = perf_counter()
        self.finish_reason = "stop" if stream.stopped else self.generator.finish_reason
        self.timings = Timings(
            prompt_tokens=len(self.prompt),
            cached_tokens=cached,
            new_tokens=len(self.tokens),
            ttft=(first or ended) - self._began,
            decode=ended - (first or ended),
        )

    def _emit(self, text: str) -> Iterator[str]:
        if text:
            self.text += text
            yield text

    def to_json(self) -> dict[str, Any]:
        """Return the whole result as plain data for JSON."""
        result: dict[str, Any] = {
            "text": self.text,
            "finish_reason": self.finish_reason,
            "tokens": self.tokens.tolist(),
        }
        if self.params.logprobs is not None:
            result["logprobs"] = [asdict(token) for token in self.logprobs]
        if self.timings is not None:
            result["timings"] = self.timings.to_json()
        return result
