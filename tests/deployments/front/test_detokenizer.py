"""Incremental detokenization over small vocabularies: characters, leading space, stop strings, offsets."""

import time
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.front.detokenizer import IncrementalDetokenizer, TextOffsets
from deployments.front.tokenizer import Tokenizer, Vocabulary


class Pieces(Tokenizer):
    """A tokenizer that only decodes."""

    def __init__(self, pieces: Sequence[bytes], special: Sequence[int] = (), leading_space: bool = False) -> None:
        super().__init__(Vocabulary(pieces=pieces, special_ids=frozenset(special), leading_space=leading_space))

    def _encode(self, text: str, add_special_tokens: bool, parse_special: bool) -> list[int]:
        raise NotImplementedError


BYTES = Pieces([bytes([byte]) for byte in range(256)] + [b"<end>"], special=[256])


def stream(detokenizer: IncrementalDetokenizer, ids: Sequence[int]) -> list[str]:
    return [*(detokenizer.push([i]) for i in ids), detokenizer.flush()]


def test_a_character_comes_when_its_last_byte_does() -> None:
    ids = list("a😀é".encode())
    parts = stream(IncrementalDetokenizer(BYTES), ids)
    assert parts == ["a", "", "", "", "😀", "", "é", ""]


def test_invalid_bytes_become_replacement_characters_once_it_is_clear() -> None:
    assert stream(IncrementalDetokenizer(BYTES), [0xF0, 0x9F, 0x41]) == ["", "", "\ufffdA", ""]
    assert stream(IncrementalDetokenizer(BYTES), [0xFF, 0x41]) == ["\ufffd", "A", ""]
    assert stream(IncrementalDetokenizer(BYTES), [0xF0, 0x9F]) == ["", "", "\ufffd"]


def test_special_tokens_show_only_when_asked() -> None:
    assert "".join(stream(IncrementalDetokenizer(BYTES), [65, 256, 66])) == "AB"
    assert "".join(stream(IncrementalDetokenizer(BYTES, skip_special_tokens=False), [65, 256, 66])) == "A<end>B"


def test_leading_space() -> None:
    tokenizer = Pieces([b"", b" the", b" ", b"</s>"], special=[0, 3], leading_space=True)
    assert stream(IncrementalDetokenizer(tokenizer), [0, 1, 1]) == ["", " the", " the", ""]
    assert stream(IncrementalDetokenizer(tokenizer, continues=False), [0, 1, 1]) == ["", "the", " the", ""]
    assert stream(IncrementalDetokenizer(tokenizer, continues=False), [2, 2, 1]) == ["", " ", " the", ""]


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    detokenizer = IncrementalDetokenizer(BYTES, stop=["abac", "xyz"])
    assert [detokenizer.push([i]) for i in b"1ab2"] == ["1", "", "", "ab2"]
    assert [detokenizer.push([i]) for i in b"ababac!"] == ["", "", "", "ab", "", "", ""]
    assert detokenizer.stop_reason == "abac"
    assert detokenizer.num_tokens == 10
    assert detokenizer.flush() == ""


def test_what_was_held_back_comes_at_the_end() -> None:
    detokenizer = IncrementalDetokenizer(BYTES, stop=["STOP"])
    assert stream(detokenizer, b"go ST") == ["g", "o", " ", "", "", "ST"]
    assert detokenizer.stop_reason is None


def test_the_stop_string_shows_when_asked_and_nothing_after_it() -> None:
    tokenizer = Pieces([b"one S", b"TO", b"P two", b" three"])
    detokenizer = IncrementalDetokenizer(tokenizer, stop=["STOP"], include_stop_str_in_output=True)
    assert stream(detokenizer, [0, 1, 2, 3]) == ["one S", "TO", "P", "", ""]
    assert (detokenizer.stop_reason, detokenizer.num_tokens) == ("STOP", 3)
    cut_short = IncrementalDetokenizer(tokenizer, stop=["STOP"], include_stop_str_in_output=True)
    assert stream(cut_short, [0, 1]) == ["one S", "TO", ""]


def test_the_stop_string_completed_first_wins() -> None:
    for ids in ([0], [1, 2, 3, 4]):
        tokenizer = Pieces([b"abcd", b"a", b"b", b"c", b"d"])
        detokenizer = IncrementalDetokenizer(tokenizer, stop=["abcd", "c"])
        assert "".join(stream(detokenizer, ids)) == "ab"
        assert detokenizer.stop_reason == "c"
        detokenizer = IncrementalDetokenizer(tokenizer, stop=["d", "bcd"])
        assert "".join(stream(detokenizer, ids)) == "a"
        assert detokenizer.stop_reason == "bcd"


def test_stop_strings_do_not_count_within_the_first_tokens() -> None:
    tokenizer = Pieces([b"a.", b".", b"b"])
    detokenizer = IncrementalDetokenizer(tokenizer, stop=["."], min_tokens=2)
    assert "".join(stream(detokenizer, [0, 1, 2, 1, 2])) == "a..b"
    assert detokenizer.num_tokens == 4
    straddling = IncrementalDetokenizer(tokenizer, stop=[".."], min_tokens=1)
    assert "".join(stream(straddling, [0, 1, 2])) == "a"


def test_a_stop_string_inside_several_tokens_of_one_push() -> None:
    detokenizer = IncrementalDetokenizer(BYTES, stop=["\n\n"])
    assert detokenizer.push(list(b"one\n\ntwo")) == "one"
    assert (detokenizer.stop_reason, detokenizer.num_tokens) == ("\n\n", 5)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        IncrementalDetokenizer(BYTES, stop=["a", ""])


def expected(text: str, stops: Sequence[str], early: int, include: bool) -> tuple[str, str | None]:
    """The slow way: try every end of the text in turn."""
    for end in range(early + 1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end if include else end - len(stop)], stop
    return text, None


@given(
    pieces=st.lists(st.text("abé😀", max_size=4), max_size=12),
    stops=st.lists(st.text("abé😀", min_size=1, max_size=5), min_size=1, max_size=3),
    min_tokens=st.integers(0, 4),
    include=st.booleans(),
)
def test_stop_strings_as_the_slow_way_finds_them(
    pieces: list[str], stops: list[str], min_tokens: int, include: bool
) -> None:
    tokenizer = Pieces([piece.encode() for piece in pieces])
    detokenizer = IncrementalDetokenizer(
        tokenizer, stop=stops, min_tokens=min_tokens, include_stop_str_in_output=include
    )
    text = "".join(pieces)
    early = len("".join(pieces[:min_tokens]))
    emitted = "".join(stream(detokenizer, range(len(pieces))))
    assert (emitted, detokenizer.stop_reason) == expected(text, stops, early, include)


@given(data=st.binary(max_size=60), cuts=st.lists(st.integers(1, 5), max_size=60))
def test_any_bytes_read_as_the_whole(data: bytes, cuts: list[int]) -> None:
    detokenizer, at, emitted = IncrementalDetokenizer(BYTES), 0, ""
    for cut in [*cuts, 60]:
        emitted += detokenizer.push(list(data[at : at + cut]))
        at += cut
    assert emitted + detokenizer.flush() == data.decode(errors="replace")


def test_offsets() -> None:
    tokenizer = Pieces([b"one ", b"\xf0\x9f", b"\x98\x80", b"two", b"<s>"], special=[4])
    offsets = TextOffsets(tokenizer, start=10)
    assert offsets.push([4, 0, 1, 2]) == [10, 10, 14, 14]
    assert offsets.push([3, 3]) == [15, 18]


def test_a_token_costs_a_few_microseconds() -> None:
    """1 to 2 us measured; re-decoding a window of tokens costs ten times that."""
    ids = list(("the quick brown fox " * 1000).encode())
    for stop in ([], ["\n\nUser:"]):
        best = float("inf")
        for _ in range(3):
            detokenizer = IncrementalDetokenizer(BYTES, stop=stop)
            start = time.process_time()
            for i in ids:
                detokenizer.push((i,))
            best = min(best, time.process_time() - start)
        assert best / len(ids) < 10e-6
