"""The same text however its bytes are cut; never half a character, never a stop string or the beginning of one."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import example, given, settings
from hypothesis import strategies as st

from orcaserve.serve.detokenize import Detokenizer, StopStrings

STOPS = st.lists(st.text("abé世", min_size=1, max_size=5), max_size=4)
BYTES = st.one_of(st.text("abé世", max_size=40).map(str.encode), st.binary(max_size=40))


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[a:b] for a, b in pairwise(edges)]


def plain(data: bytes, stops: list[str]) -> tuple[str, bool]:
    """The oracle: the shortest prefix that ends with a stop string, without the longest one that it ends with."""
    for end in range(len(data) + 1):
        found = [stop.encode() for stop in stops if data[:end].endswith(stop.encode())]
        if found:
            return data[: end - max(map(len, found))].decode(errors="replace"), True
    return data.decode(errors="replace"), False


@settings(deadline=None, max_examples=400)
@given(BYTES, st.lists(st.integers(0, 100), max_size=12), STOPS)
@example(b"aab", [1, 2], ["aab", "ab"])
@example("世".encode()[:2] + b"a", [1], ["a"])
@example(b"aaaab", [1, 2, 3], ["aab"])
def test_any_cut_gives_the_same_text(data: bytes, places: list[int], stops: list[str]) -> None:
    detokenizer = Detokenizer(StopStrings(stops))
    pieces = [detokenizer.feed(part) for part in cut(data, places)]
    text = "".join(pieces) + detokenizer.finish()
    assert (text, detokenizer.is_stopped) == plain(data, stops)


@settings(deadline=None, max_examples=200)
@given(st.text("abé世", max_size=40), st.lists(st.integers(0, 100), max_size=40), STOPS)
def test_what_has_left_never_has_to_be_taken_back(text: str, places: list[int], stops: list[str]) -> None:
    """Every piece is whole characters, and what is held back is no more than the beginning of a stop string."""
    data = text.encode()
    detokenizer = Detokenizer(StopStrings(stops))
    out, fed = "", b""
    for part in cut(data, places):
        out += detokenizer.feed(part)
        fed += part
        if detokenizer.is_stopped:
            break
        assert "\ufffd" not in out
        held = fed[len(out.encode()) :]
        assert fed.startswith(out.encode())
        whole = held.decode(errors="ignore")
        assert whole == "" or any(stop.encode().startswith(held) for stop in stops), (held, stops)


def test_no_stop_string_begins_where_it_may_not() -> None:
    detokenizer = Detokenizer(StopStrings(["ab"]))
    assert detokenizer.feed(b"ab a", may_stop=False) == "ab a"
    assert detokenizer.feed(b"b") == "b"
    assert detokenizer.feed(b"a") == ""
    assert detokenizer.feed(b"bc") == ""
    assert detokenizer.is_stopped
    assert detokenizer.feed(b"more") == detokenizer.finish() == ""


def test_long_stop_strings_cost_no_more_than_short_ones() -> None:
    stop = "a" * 1000 + "b"
    detokenizer = Detokenizer(StopStrings([stop]))
    text = "".join(detokenizer.feed(b"a") for _ in range(5000)) + detokenizer.finish()
    assert text == "a" * 5000
