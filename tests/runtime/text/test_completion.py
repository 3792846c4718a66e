"""One completion from scripted logits and a real tokenizer: text, end, times."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from exporter.tokenizer.read import read_tokenizer
from graphs.errors import MistralcError, UsageError
from graphs.spec import RingSpec
from runtime import completion as completion_module
from runtime.backends.session import Ids, Logits
from runtime.completion import Completion, Limits, Timings
from runtime.decoding.generator import Generator
from runtime.decoding.ring import Ring
from runtime.decoding.sampling import SamplingParams
from runtime.text.tokenizer import Tokenizer
from tests.support.make_checkpoint import tiny_spec

SPEC = tiny_spec(window=8)
GREEDY = SamplingParams(temperature=0.0)
EOS = 2
SECONDS_PER_TOKEN = 0.25  # of the scripted session, a power of two so that sums are exact
HIGH = 5.0  # logit of the scripted token; all others are 0


class Script:
    """A session that prefers token `answers[p]` after position p; its clock counts its own work."""

    def __init__(self) -> None:
        self.answers: dict[int, int] = {}
        self.fed: list[int] = []  # every position that was fed, in order
        self.now = 100.0

    def resize(self, capacities: Mapping[int | None, int]) -> None:
        """There is no ring to resize."""

    def step(self, input_ids: Ids, position_ids: Ids, logits_indices: Ids) -> Logits:
        positions = position_ids[0].tolist()
        assert input_ids.shape == position_ids.shape == (1, len(positions))
        assert logits_indices.tolist() == [[len(positions) - 1]]
        self.fed += positions
        self.now += SECONDS_PER_TOKEN * len(positions)
        logits = np.zeros((1, 1, SPEC.vocab_size), np.float32)
        if positions[-1] in self.answers:  # a step that ends within the prompt has none
            logits[0, 0, self.answers[positions[-1]]] = HIGH
        return logits


@pytest.fixture(scope="module")
def tokenizer(sliding_checkpoint: Path) -> Tokenizer:
    files = read_tokenizer(sliding_checkpoint)
    backend = tokenizers.Tokenizer.from_str(files.tokenizer_json)
    return Tokenizer(backend, files.tokenizer_config, files.generation_config)


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def generator(script: Script) -> Generator:
    return Generator(script, Ring(SPEC, RingSpec(chunk=8, context=512)), SPEC.vocab_size)


def answer(
    generator: Generator,
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    *,
    prompt: Sequence[int] = (1, 70, 71),
    params: SamplingParams = GREEDY,
    stop: tuple[str, ...] = (),
    most: int | None = None,
    chat: bool = False,
) -> tuple[Completion, list[str]]:
    """Run a completion whose logits prefer `tokens` in turn; returns it and its pieces."""
    script = generator.session
    assert isinstance(script, Script)
    script.answers = {len(prompt) - 1 + i: token for i, token in enumerate(tokens)}
    limits = Limits(max_new_tokens=most or len(tokens), stop=stop)
    completion = Completion(generator, tokenizer, prompt, params, limits, chat=chat)
    return completion, list(completion)


def spelled(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the tokens of a text: one for each byte, since the tiny vocabulary has no merges."""
    ids = tokenizer.encode(text, add_bos=False)
    assert len(ids) == len(text.encode())
    return ids


# Text


def test_text_arrives_piece_by_piece(generator: Generator, tokenizer: Tokenizer) -> None:
    done, pieces = answer(generator, tokenizer, spelled(tokenizer, "abc"))
    assert (pieces, done.text) == (["a", "b", "c"], "abc")


def test_a_character_spread_over_tokens_is_sent_whole(
    generator: Generator, tokenizer: Tokenizer
) -> None:
    text = "né€🙂!"
    done, pieces = answer(generator, tokenizer, spelled(tokenizer, text))
    assert pieces == list(text), "a piece must be whole characters, however many tokens they take"
    assert done.text == text
    assert len(done.tokens) == len(text.encode())


def test_a_character_cut_off_by_the_limit_is_one_replacement_character(
    generator: Generator, tokenizer: Tokenizer
) -> None:
    euro = spelled(tokenizer, "a€")
    done, pieces = answer(generator, tokenizer, euro, most=len(euro) - 1)
    assert pieces == ["a", "\ufffd"]
    assert done.finish_reason == "length"


def test_the_end_of_text_token_ends_the_answer_and_has_no_text(
    generator: Generator, tokenizer: Tokenizer
) -> None:
    ids = [*spelled(tokenizer, "hi"), EOS, *spelled(tokenizer, "never")]
    done, _ = answer(generator, tokenizer, ids)
    assert done.text == "hi"
    assert done.finish_reason == "stop"
    assert done.tokens.tolist() == ids[:3], "the end-of-text token is reported among the tokens"


def test_an_answer_that_is_only_the_end_of_text_token_is_empty(
    generator: Generator, tokenizer: Tokenizer
) -> None:
    done, pieces = answer(generator, tokenizer, [EOS])
    assert (pieces, done.text, done.finish_reason) == ([], "", "stop")


def test_a_chat_answer_drops_the_first_words_space_and_a_continuation_keeps_it(
    generator: Generator,
) -> None:
    words = {"<s>": 0, "</s>": 1, "\u2581Hi": 2, "\u2581there": 3}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=words, merges=[]))
    backend.decoder = tokenizers.decoders.Metaspace()
    metaspace = Tokenizer(backend, {}, {"eos_token_id": [1]})
    assert answer(generator, metaspace, [2, 3], chat=True)[0].text == "Hi there"
    assert answer(generator, metaspace, [2, 3], chat=False)[0].text == " Hi there"


# Ends


def test_a_stop_string_spread_over_tokens_ends_the_text_before_it(
    generator: Generator, tokenizer: Tokenizer
) -> None:
    ids = spelled(tokenizer, "one END two")
    done, pieces = answer(generator, tokenizer, ids, stop=("END",))
    assert done.text == "".join(pieces) == "one "
    assert done.finish_reason == "stop"
    assert done.tokens.tolist() == ids[:7], "sampling must end with the stop string's last token"


def test_a_stop_string_inside_one_token_ends_the_text_in_the_middle_of_it(
    generator: Generator, tokenizer: Tokenizer
) -> None:
    word = next(i for i in range(SPEC.vocab_size) if len(tokenizer.decode([i])) == 3)
    text = tokenizer.decode([word])
    done, _ = answer(generator, tokenizer, [word, word], stop=(text[2],))
    assert done.text == text[:2]
    assert len(done.tokens) == 1


def test_a_stop_string_of_one_character_of_many_bytes_is_found(
    generator: Generator, tokenizer: Tokenizer
) -> None:
    done, _ = answer(generator, tokenizer, spelled(tokenizer, "oh 🙂 no"), stop=("🙂",))
    assert done.text == "oh "


def test_the_beginning_of_a_stop_string_that_never_completes_is_sent(
    generator: Generator, tokenizer: Tokenizer
) -> None:
    done, pieces = answer(generator, tokenizer, spelled(tokenizer, "EN ENE"), stop=("END",))
    assert done.text == "EN ENE"
    # A piece is sent when the next character rules the stop string out; "E" only at the end.
    assert pieces == ["EN ", "EN", "E"]
    assert done.finish_reason == "length"


def test_the_end_of_text_token_releases_text_held_back_for_a_stop_string(
    generator: Generator, tokenizer: Tokenizer
) -> None:
    done, _ = answer(generator, tokenizer, [*spelled(tokenizer, "xEN"), EOS], stop=("END",))
    assert (done.text, done.finish_reason) == ("xEN", "stop")


def test_an_answer_ends_after_max_new_tokens(generator: Generator, tokenizer: Tokenizer) -> None:
    done, _ = answer(generator, tokenizer, spelled(tokenizer, "abcdef"), most=4)
    assert (done.text, done.finish_reason) == ("abcd", "length")


def test_without_a_window_an_answer_ends_at_the_end_of_the_context(tokenizer: Tokenizer) -> None:
    plain = tiny_spec()
    ring = Ring(plain, RingSpec(chunk=8, context=10))
    generator = Generator(Script(), ring, plain.vocab_size)
    done, _ = answer(generator, tokenizer, spelled(tokenizer, "x" * 40), prompt=[1] * 6)
    # Positions 6 to 9 take a token each; the fifth is sampled but not written to the ring.
    assert len(done.tokens) == 5
    assert done.finish_reason == "length"


def test_an_empty_stop_string_is_refused_before_anything_is_generated() -> None:
    with pytest.raises(UsageError, match="stop string is empty"):
        Limits(stop=("END", ""))


def test_a_prompt_without_tokens_is_refused(generator: Generator, tokenizer: Tokenizer) -> None:
    with pytest.raises(MistralcError, match="No token was given"):
        answer(generator, tokenizer, [5], prompt=[])


# The ring


def test_a_prompt_that_was_prefilled_is_not_fed_again(
    generator: Generator, tokenizer: Tokenizer, script: Script
) -> None:
    script.answers = {2: 70, 3: 71}
    limits = Limits(max_new_tokens=2)
    done = Completion(generator, tokenizer, [1, 70, 71], GREEDY, limits)
    seen: list[int] = []
    done.prefill(seen.append)
    assert sum(seen) == 3, "progress counts the prompt's tokens"
    list(done)
    assert script.fed == [0, 1, 2, 3]


def test_the_next_prompt_costs_only_what_the_ring_does_not_hold_yet(
    generator: Generator, tokenizer: Tokenizer, script: Script
) -> None:
    first, _ = answer(generator, tokenizer, [80, 81], prompt=[1, 70, 71])
    script.fed.clear()
    longer = [1, 70, 71, *first.tokens, 90, 91]
    second, _ = answer(generator, tokenizer, [82], prompt=longer)
    # The last token of an answer is sampled but not fed, so positions 0 to 3 are in the ring.
    assert script.fed == [4, 5, 6]
    assert second.timings is not None
    assert (second.timings.prompt_tokens, second.timings.cached_tokens) == (7, 4)


def test_a_prompt_that_was_edited_goes_back_to_where_it_differs(
    generator: Generator, tokenizer: Tokenizer, script: Script
) -> None:
    answer(generator, tokenizer, [80, 81], prompt=[1, 70, 71, 72])
    script.fed.clear()
    second, _ = answer(generator, tokenizer, [82], prompt=[1, 70, 99])
    assert script.fed == [2]
    assert second.timings is not None
    assert second.timings.cached_tokens == 2


# Times


def test_timings_measure_the_sessions_work(
    generator: Generator,
    tokenizer: Tokenizer,
    script: Script,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(completion_module, "perf_counter", lambda: script.now)
    done, _ = answer(generator, tokenizer, [80, 81, 82, 83, 84], prompt=[1] * 12)
    assert done.timings is not None
    assert done.timings.to_json() == {
        "prompt_tokens": 12,
        "cached_tokens": 0,
        "new_tokens": 5,
        "ttft_s": 12 * SECONDS_PER_TOKEN,
        "decode_s": 4 * SECONDS_PER_TOKEN,  # the first token came with the prompt
        "prefill_tokens_per_s": 1 / SECONDS_PER_TOKEN,
        "decode_tokens_per_s": 1 / SECONDS_PER_TOKEN,
    }


def test_speed_of_a_prompt_counts_only_tokens_that_were_fed(
    generator: Generator,
    tokenizer: Tokenizer,
    script: Script,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(completion_module, "perf_counter", lambda: script.now)
    answer(generator, tokenizer, [80], prompt=[1, 70, 71])
    done, _ = answer(generator, tokenizer, [81], prompt=[1, 70, 71, 72, 73])
    assert done.timings is not None
    assert done.timings.cached_tokens == 3
    assert done.timings.ttft == 2 * SECONDS_PER_TOKEN
    assert done.timings.prefill_rate == 1 / SECONDS_PER_TOKEN
    assert done.timings.decode_rate is None, "one token has no time between tokens"


def test_a_rate_without_work_is_none_and_not_a_division_by_zero() -> None:
    nothing = Timings(prompt_tokens=3, cached_tokens=3, new_tokens=2, ttft=0.0, decode=0.0)
    assert nothing.prefill_rate is None
    assert nothing.decode_rate is None


# The result


def test_log_probabilities_are_those_of_the_logits(
    generator: Generator, tokenizer: Tokenizer
) -> None:
    params = SamplingParams(temperature=0.0, logprobs=2)
    done, _ = answer(generator, tokenizer, [80, 81], params=params)
    norm = math.log(math.exp(HIGH) + SPEC.vocab_size - 1)
    result = done.to_json()
    for entry, token in zip(result["logprobs"], (80, 81), strict=True):
        assert entry["token_id"] == token
        # All in float64: 1e-9 is far above its rounding error and far below that of float32.
        assert entry["logprob"] == pytest.approx(HIGH - norm, abs=1e-9)
        (best, best_logprob), (other, other_logprob) = entry["top_logprobs"]
        assert (best, other) == (token, 0), "of equal logits the lowest id comes first"
        assert best_logprob == entry["logprob"]
        assert other_logprob == pytest.approx(-norm, abs=1e-9)  # as above


def test_log_probabilities_are_absent_unless_asked_for(
    generator: Generator, tokenizer: Tokenizer
) -> None:
    result = answer(generator, tokenizer, [80])[0].to_json()
    assert result.keys() == {"text", "finish_reason", "tokens", "timings"}


def test_a_seed_draws_the_same_answer_again_and_another_seed_another(tokenizer: Tokenizer) -> None:
    def drawn(seed: int) -> list[int]:
        ring = Ring(SPEC, RingSpec(chunk=8, context=512))
        generator = Generator(Script(), ring, SPEC.vocab_size)
        params = SamplingParams(temperature=1.0, seed=seed, logit_bias={EOS: -100.0})
        return answer(generator, tokenizer, [80] * 30, params=params)[0].tokens.tolist()

    assert drawn(1) == drawn(1)
    # Logits are nearly flat, so 30 draws from 320 tokens are not all equal by chance.
    assert all(drawn(a) != drawn(b) for a, b in pairwise(range(3)))
