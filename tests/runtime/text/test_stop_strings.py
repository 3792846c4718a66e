"""Stop strings are found however the text is cut, and only what may become one is held back."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphs.errors import UsageError
from runtime.text.stop_strings import StopStrings

LETTERS = "ab\n"  # so few that stop strings often overlap, nest and nearly match
texts = st.text(alphabet=LETTERS, max_size=40)
stop_lists = st.lists(st.text(alphabet=LETTERS, min_size=1, max_size=6), max_size=4)
cuts = st.lists(st.integers(0, 40), max_size=12)


def pieces(text: str, at: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(min(cut, len(text)) for cut in at)})
    return [text[i:j] for i, j in pairwise(edges)]


def stream(stops: list[str], parts: list[str]) -> tuple[str, bool, str | None]:
    """Return the whole output, whether it stopped, and the stop string."""
    stopping, out = StopStrings(stops), ""
    for part in parts:
        text, stopped = stopping.push(part)
        out += text
        if stopped:
            return out, True, stopping.matched
    return out + stopping.flush(), False, stopping.matched


def read_at_once(stops: list[str], text: str) -> tuple[str, bool, str | None]:
    """By definition: cut at the first place where a stop string is complete, the longest there."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], True, longest
    return text, False, None


@given(stop_lists, texts, cuts)
def test_however_the_text_is_cut_the_output_is_the_text_before_the_first_stop(
    stops: list[str], text: str, at: list[int]
) -> None:
    assert stream(stops, pieces(text, at)) == read_at_once(stops, text)


@given(stop_lists, texts, cuts)
def test_only_a_possible_beginning_of_a_stop_string_is_held_back(
    stops: list[str], text: str, at: list[int]
) -> None:
    stopping, given_text, out = StopStrings(stops), "", ""
    for part in pieces(text, at):
        released, stopped = stopping.push(part)
        if stopped:
            return
        given_text, out = given_text + part, out + released
        held = given_text[len(out) :]
        beginnings = {stop[:size] for stop in stops for size in range(len(stop))} | {""}
        assert given_text == out + held
        assert held == max((b for b in beginnings if given_text.endswith(b)), key=len)


def test_the_example_in_the_docstring_is_true() -> None:
    stopping = StopStrings(["<end>", "\n\n"])
    assert stopping.push("Hello <e") == ("Hello ", False)
    assert stopping.push("m>\n") == ("<em>", False)
    assert stopping.push("\nmore") == ("", True)
    assert stopping.matched == "\n\n"


def test_without_stop_strings_every_piece_passes_at_once() -> None:
    stopping = StopStrings([])
    assert stopping.push("some text") == ("some text", False)
    assert stopping.flush() == ""


def test_a_stop_that_is_complete_first_wins_over_one_that_began_earlier() -> None:
    assert stream(["abcd", "bc"], ["xa", "b", "cd"]) == ("xa", True, "bc")


def test_of_stops_complete_at_the_same_character_the_longer_wins() -> None:
    assert stream(["c", "abc", "bc"], ["xab", "c"]) == ("x", True, "abc")


def test_a_stop_inside_a_longer_unfinished_one_is_found_on_the_way() -> None:
    assert stream(["aab", "b"], ["aaa", "cb"]) == ("aaac", True, "b")


def test_nothing_comes_after_a_stop() -> None:
    stopping = StopStrings(["."])
    assert stopping.push("One. Two.") == ("One", True)
    assert stopping.push(" Three") == ("", True)
    assert stopping.flush() == ""


def test_flush_returns_the_held_text_and_only_once() -> None:
    stopping = StopStrings(["</answer>"])
    assert stopping.push("4 < 5 </answer") == ("4 < 5 ", False)
    assert stopping.flush() == "</answer"
    assert stopping.flush() == ""


def test_characters_beyond_the_basic_plane_are_single_characters() -> None:
    assert stream(["🙂🙂"], ["a🙂", "b🙂", "🙂c"]) == ("a🙂b", True, "🙂🙂")


def test_a_long_stop_string_that_arrives_in_single_characters_is_held_back_whole() -> None:
    stopping = StopStrings(["a" * 5000 + "b"])
    out = [stopping.push("a").text for _ in range(20_000)]
    assert [len(text) for text in out] == [0] * 5000 + [1] * 15_000
    assert stopping.push("b") == ("", True)


@pytest.mark.parametrize("stops", [[""], ["end", ""]])
def test_an_empty_stop_string_is_refused(stops: list[str]) -> None:
    with pytest.raises(UsageError, match="stop string is empty"):
        StopStrings(stops)


def test_a_string_instead_of_a_list_is_refused() -> None:
    with pytest.raises(UsageError, match="Put it in a list"):
        StopStrings("end")
