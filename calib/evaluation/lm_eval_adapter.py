r"""Run EleutherAI's lm-evaluation-harness on a bundle. Knows nothing about any task.

MMLU, HellaSwag and the other tasks run on the shipped bundle, with its quantization and its sliding
window, through the session that serves it. Install with `pip install 'mistralc[cpu,eval]'`, then

    python -m calib.evaluation.lm_eval_adapter --model mistralc \
        --model_args bundle=build/smollm2-cpu-fp32 --tasks hellaswag,mmlu --limit 100

This is the harness's own command line with the model `mistralc` added. In Python, importing this
module registers the model: `lm_eval.simple_evaluate(model="mistralc", model_args="bundle=PATH",
tasks=["hellaswag"])`. The model's arguments are `bundle`, `threads` and `check=False`.

Texts are encoded as in the runtime: with a BOS if the checkpoint asks for one, and control tokens
spelled out in a task stay plain text. `--apply_chat_template` works, except for tasks that begin
the answer themselves. A text that is too long for a bundle without a sliding window loses its
beginning, as in the harness's own models.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from calib.evaluation.multiple_choice import Likelihood, Scorer, prefix_id
from graphs.errors import MistralcError
from runtime.completion import Completion, Limits
from runtime.decoding.generator import Generator
from runtime.decoding.sampling import SamplingParams
from runtime.load import load, make_ring
from runtime.system.progress import stage_for

NAME = "mistralc"
NEW_TOKENS = 256  # limit of an answer if the task sets none, as in the harness's own models
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens")  # names that tasks use for the limit
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")

_log = logging.getLogger(__name__)

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # texts, context, continuation


class BundleModel(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """The bundle at `bundle`, loaded for one sequence.

    The harness's settings for devices and batches are ignored: the bundle has a fixed target, and
    requests run one by one.
    """

    def __init__(
        self,
        bundle: str,
        threads: int | None = None,
        check: bool = True,
        **_ignored: object,
    ) -> None:
        super().__init__()
        loaded = load(Path(bundle), threads=threads, check=check)
        self._manifest, self._build = loaded.bundle.manifest, loaded.bundle.manifest.build
        self._tokenizer = loaded.tokenizer
        self._session = loaded.session
        # Token ids by rendered text, because control tokens cannot be told from that text.
        self._chats: dict[str, list[int]] = {}

    @property
    def eot_token_id(self) -> int:
        """The token placed before a text without context: the BOS, if there is one."""
        return prefix_id(self._tokenizer)

    @property
    def tokenizer_name(self) -> str:
        """The key of the harness's request cache."""
        return f"{NAME}-{self._manifest.files['tokenizer.json'].sha256}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_ignored: object
    ) -> list[int]:
        """Return the ids of plain text, or of a chat rendered by `apply_chat_template`."""
        if string in self._chats:
            return list(self._chats[string])
        return self._tokenizer.encode(string, add_bos=add_special_tokens is not False)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render a chat to text for the harness, and remember the chat's token ids."""
        if not add_generation_prompt:
            raise MistralcError(
                "The task begins the model's answer itself (gen_prefix), which is not supported "
                "with a chat template. Run it without --apply_chat_template."
            )
        text = self._tokenizer.render_chat(chat_history)
        self._chats[text] = self._tokenizer.encode_chat(chat_history)
        return text

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of whole texts, in as few pieces as the context allows."""
        scorer, found = Scorer(self._session, self._build), []
        with stage_for(quiet=disable_tqdm)("Reading texts", len(requests)) as advance:
            for (text,) in (request.args for request in requests):
                pieces = self._pieces(self.tok_encode(text, add_special_tokens=False))
                found.append(sum(self._score(scorer, *piece).log for piece in pieces))
                self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
                advance(1)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue texts until a stop string, the end of text, or the token limit."""
        generator = Generator(self._session, make_ring(self._build), self._build.spec.vocab_size)
        found = []
        with stage_for(quiet=disable_tqdm)("Generating", len(requests)) as advance:
            for context, settings in (request.args for request in requests):
                params, limits = _settings(settings)
                ids = self.tok_encode(context) or [self.prefix_token_id]
                if not self._build.spec.slides:
                    room = self._build.ring.context - (limits.max_new_tokens or 0)
                    ids = _last(ids, max(room, 1))
                chat = context in self._chats
                completion = Completion(generator, self._tokenizer, ids, params, limits, chat=chat)
                found.append("".join(completion))
                self.cache_hook.add_partial("generate_until", (context, settings), found[-1])
                advance(1)
        return found

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context in self._chats:
            return self.tok_encode(context), self._tokenizer.encode(continuation, add_bos=False)
        pair: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
        return pair

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **_ignored: object
    ) -> list[tuple[float, bool]]:
        scorer, found = Scorer(self._session, self._build), []
        with stage_for(quiet=disable_tqdm)("Scoring", len(requests)) as advance:
            for texts, context, continuation in requests:
                score = self._score(scorer, context or [self.prefix_token_id], continuation)
                found.append((score.log, score.greedy))
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, found[-1])
                advance(1)
        return found

    def _pieces(self, ids: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        longest = len(ids) if self._build.spec.slides else self._build.ring.context
        windows = get_rolling_token_windows(ids, self.prefix_token_id, max(longest, 1), 1)
        return map(make_disjoint_window, windows)

    @staticmethod
    def _score(scorer: Scorer, context: list[int], continuation: list[int]) -> Likelihood:
        ids = context + continuation
        if scorer.longest is not None:
            ids = _last(ids, max(scorer.longest, len(continuation) + 1))
        return scorer.score(ids, len(ids) - len(continuation))


def _last(ids: list[int], count: int) -> list[int]:
    """Return the last `count` ids; logs a warning if others are dropped."""
    if len(ids) > count:
        _log.warning(
            "A text of %d tokens is cut to its last %d, the bundle's context.", len(ids), count
        )
    return ids[-count:]


def _settings(given: Mapping[str, Any]) -> tuple[SamplingParams, Limits]:
    """Translate a task's `generation_kwargs`; decoding is greedy unless it asks for sampling."""
    until = given.get("until") or []
    stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
    lengths = [given[name] for name in _LENGTHS if given.get(name) is not None]
    values = {name: given[name] for name in _SAMPLING if given.get(name) is not None}
    sampled = given.get("do_sample")
    if sampled is False:
        values["temperature"] = 0.0
    values.setdefault("temperature", 1.0 if sampled else 0.0)
    limits = Limits(max_new_tokens=int(lengths[0]) if lengths else NEW_TOKENS, stop=stop)
    return SamplingParams(**values), limits


register_model(NAME)(BundleModel)

if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
