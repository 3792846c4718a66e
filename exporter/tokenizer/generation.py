"""Decide what of a checkpoint's `generation_config.json` a bundle carries. Reads no file.

Values have the meaning that transformers gives them (`GenerationConfig`). One that no run would
accept is an error here, at export. One that the runtime has no counterpart for is named in a note.
"""

import math
from collections.abc import Mapping
from typing import Any

from exporter.fields import LARGEST_NUMBER
from graphs.errors import MistralcError, UsageError
from runtime.decoding.sampling_defaults import sampling_params
from runtime.text.tokenizer import is_token_id

_NUMBERS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_DEFAULT_TOP_K = 50  # of transformers, if sampling is on and the file does not say

# Settings that change the text, are not carried over, and the values with which they change none.
_NOT_CARRIED: Mapping[str, tuple[Any, ...]] = {
    "max_new_tokens": (), "max_length": (), "max_time": (), "min_new_tokens": (0,),
    "min_length": (0,), "no_repeat_ngram_size": (0,), "num_beams": (1,), "num_beam_groups": (1,),
    "typical_p": (1.0,), "top_h": (), "epsilon_cutoff": (0.0,), "eta_cutoff": (0.0,),
    "begin_suppress_tokens": ([],), "forced_bos_token_id": (), "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (), "sequence_bias": ({}, []), "guidance_scale": (1, 1.0),
    "watermarking_config": (), "penalty_alpha": (0,), "dola_layers": (), "p_less": (False,),
}  # fmt: skip
_INSTEAD: Mapping[str, str] = {
    "max_new_tokens": "; give --max-new-tokens",
    "max_length": "; the bundle's context is the limit",
}


def read_generation(values: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """Return the values that a bundle carries, and notes on those that it does not.

    Raises MistralcError for a value that no run would accept.
    """
    given = {name: value for name, value in values.items() if value is not None}
    carried: dict[str, Any] = {
        name: _number(given[name], name, where) for name in _NUMBERS if name in given
    }
    if "top_k" in carried:
        carried["top_k"] = _top_k(carried["top_k"], where)
    sampling = given.get("do_sample", False)
    if not isinstance(sampling, bool):
        raise _refused("do_sample", sampling, "true or false", where)
    if sampling and "top_k" not in carried:
        carried["top_k"] = _DEFAULT_TOP_K
    if carried or "do_sample" in given:
        carried["do_sample"] = sampling
    stops = given.get("stop_strings", [])
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
        raise _refused("stop_strings", stops, "texts that are not empty", where)
    if stops:
        carried["stop_strings"] = stops
    banned, longer = _banned(given, where)
    if banned:
        carried["suppress_tokens"] = banned
    _try(carried, where)
    return carried, _notes(given, longer)


def _number(value: Any, name: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _refused(name, value, "a number", where)
    if abs(value) >= LARGEST_NUMBER or math.isnan(value):
        raise _refused(name, value, "a finite number", where)
    return value


def _top_k(value: float, where: str) -> int:
    """Return 0 for off, which some files write as -1."""
    if value != int(value) or value < -1:
        raise _refused("top_k", value, "a whole number from 0 up, or -1 for off", where)
    return max(0, int(value))


def _banned(given: Mapping[str, Any], where: str) -> tuple[list[int], int]:
    """Return the tokens that are never chosen, and how many longer sequences are forbidden."""
    tokens = given.get("suppress_tokens", [])
    words = given.get("bad_words_ids", [])
    if not isinstance(tokens, list) or not all(map(is_token_id, tokens)):
        raise _refused("suppress_tokens", tokens, "a list of token ids", where)
    good = isinstance(words, list) and all(
        isinstance(word, list) and word and all(map(is_token_id, word)) for word in words
    )
    if not good:
        raise _refused("bad_words_ids", words, "a list of lists of token ids", where)
    single = {word[0] for word in words if len(word) == 1}
    return sorted({*tokens, *single}), sum(len(word) > 1 for word in words)


def _try(carried: Mapping[str, Any], where: str) -> None:
    """Make the parameters of a run from the values, as the runtime does."""
    try:
        sampling_params({**carried, "do_sample": True}, {})
    except UsageError as error:
        raise MistralcError(
            f"{where}: {error} Every run of the bundle would refuse it: correct the file, or "
            "download it again."
        ) from error


def _notes(given: Mapping[str, Any], longer: int) -> list[str]:
    found = [
        f"generation_config.json: `{name}` ({given[name]!r:.40}) is not carried over"
        f"{_INSTEAD.get(name, '')}"
        for name, neutral in _NOT_CARRIED.items()
        if name in given and given[name] not in neutral
    ]
    if longer:
        found.append(
            f"generation_config.json: {longer} entries of `bad_words_ids` with several tokens are "
            "not carried over; those with one token are"
        )
    return found


def _refused(name: str, value: object, expected: str, where: str) -> MistralcError:
    return MistralcError(
        f"{where}: `{name}` is {value!r:.60}; expected {expected}. Every run of the bundle would "
        "refuse it: correct the file, or download it again."
    )
