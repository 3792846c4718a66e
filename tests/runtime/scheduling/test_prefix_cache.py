"""Prompts that begin alike are computed once: in a row, and in the prefix cache."""

from dataclasses import replace

import numpy as np
import pytest

from runtime.scheduling.prefix_cache import PrefixCache
from runtime.scheduling.request import End
from tests.support.scheduling import SPECS, alone, make_scheduler, request, served


def test_tokens_already_in_a_row_are_not_computed_again():
    subject, _ = make_scheduler(prefix_bytes=0)
    first, second = served(subject, request(20, 3)), served(subject, request(30, 3))
    assert first[0].end == End(reason="length", cached_tokens=0)
    assert second[0].end == End(reason="length", cached_tokens=16), "whole chunks of 8"
    assert subject.stats().cached_tokens == 16
    assert second[0].tokens == alone("unwindowed", True, request(30, 3)).tokens


def test_a_fully_cached_prompt_still_computes_its_last_chunk_for_the_logits():
    subject, _ = make_scheduler()
    served(subject, request(16, 3))
    (again,) = served(subject, request(16, 3))
    assert again.end == End(reason="length", cached_tokens=8)
    assert again.tokens == alone("unwindowed", True, request(16, 3)).tokens


@pytest.mark.parametrize("spec", SPECS)
def test_a_prompt_is_computed_once_even_if_its_row_was_reused_for_others(spec: str):
    subject, _ = make_scheduler(spec)
    served(subject, request(33, 3))
    served(subject, *(request(40, 8, seed=at) for at in range(1, 6)))
    (again,) = served(subject, request(36, 3))
    assert again.end == End(reason="length", cached_tokens=32)
    assert again.tokens == alone(spec, True, request(36, 3)).tokens


def test_simultaneous_requests_share_the_prefix_that_the_first_computed():
    subject, _ = make_scheduler()
    prefix = request(32).ids
    many = [replace(request(1), ids=(*prefix, at)) for at in range(6)]
    answers = served(subject, *many)
    assert [answer.end.cached_tokens for answer in answers if answer.end] == [0] + [32] * 5


def test_the_cache_stays_within_its_limit_and_drops_the_ends_of_old_texts_first():
    cache = PrefixCache(4 * 80)
    block = [np.zeros(10)]  # 80 bytes
    old, new = cache.keys(list(range(24)), 8), cache.keys(list(range(100, 116)), 8)
    for text in (old, new):
        for key in text:
            cache.put(key, block)
            cache.touch(text)
    assert cache.nbytes == 4 * 80
    assert [key in cache.kept for key in (*old, *new)] == [True, True, False, True, True]
    cache.touch(old)
    cache.put(b"another", block)
    assert [key in cache.kept for key in (*old, *new)] == [True, True, False, True, False]


def test_texts_share_chunks_up_to_where_they_differ_and_not_beyond():
    cache = PrefixCache(1)
    one, two = cache.keys([1, 2, 3, 4, 5, 6], 2), cache.keys([1, 2, 9, 4, 5, 6], 2)
    assert one[0] == two[0]
    assert not set(one[1:]) & set(two[1:])
    assert cache.keys([1, 2, 3], 2) == one[:1]
