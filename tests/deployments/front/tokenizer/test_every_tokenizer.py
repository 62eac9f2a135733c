"""What holds for every implementation of Tokenizer."""

import random

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from deployments.front.detokenizer import IncrementalDetokenizer, TextOffsets
from deployments.front.tokenizer import Tokenizer

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)


def test_decoding_gives_the_text_back(tokenizer: Tokenizer, texts: list[str]) -> None:
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode(tokenizer.encode(text, parse_special=False, add_special_tokens=False)) == text


@FUZZ
@given(text=UNICODE)
def test_decoding_gives_any_text_back(tokenizer: Tokenizer, text: str) -> None:
    """SmolLM2 has no token for a few control bytes; it leaves them out, in transformers too."""
    assume(set(text.encode()) <= {piece[0] for piece in tokenizer.vocabulary.pieces if len(piece) == 1})
    ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@FUZZ
@given(data=st.data(), skip=st.booleans(), continues=st.booleans())
def test_a_stream_of_any_tokens_reads_as_the_whole(
    tokenizer: Tokenizer, data: st.DataObject, skip: bool, continues: bool
) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=40))
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip, continues=continues)
    emitted = ""
    while ids_left := ids[detokenizer.num_tokens :]:
        emitted += detokenizer.push(ids_left[: data.draw(st.integers(1, 3))])
    assert emitted + detokenizer.flush() == tokenizer.decode(ids, skip_special_tokens=skip, continues=continues)


def test_no_part_of_a_stream_holds_a_broken_character(tokenizer: Tokenizer, texts: list[str]) -> None:
    for text in texts:
        if "\ufffd" in text:
            continue
        detokenizer = IncrementalDetokenizer(tokenizer, continues=False)
        parts = [detokenizer.push([i]) for i in tokenizer.encode(text)]
        assert "\ufffd" not in "".join(parts)
        assert "".join(parts) == text
        assert detokenizer.flush() == ""


def test_offsets_point_at_each_tokens_text(tokenizer: Tokenizer, texts: list[str]) -> None:
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        offsets = TextOffsets(tokenizer, start=5, continues=False).push(ids)
        for i, offset in zip(ids, offsets, strict=True):
            piece = tokenizer.token_text(i)
            at = offset - 5
            if not piece.startswith("bytes:") and at:
                assert text[at : at + len(piece)] == piece
        assert offsets == sorted(offsets)


def test_special_tokens_are_read_from_text_only_when_asked(tokenizer: Tokenizer) -> None:
    special = tokenizer.special_tokens.get("eos_token", "</s>")
    [special_id] = [i for i in tokenizer.special_ids if tokenizer.token_bytes(i) == special.encode()]
    ids = tokenizer.encode(f"one{special}two", add_special_tokens=False)
    assert ids.count(special_id) == 1
    assert tokenizer.decode(ids).replace(" ", "") == "onetwo"
    assert special in tokenizer.decode(ids, skip_special_tokens=False)
    plain = tokenizer.encode(f"one{special}two", add_special_tokens=False, parse_special=False)
    assert special_id not in plain
    assert tokenizer.decode(plain) == f"one{special}two"


def test_ids_outside_the_vocabulary_are_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(tokenizer.vocab_size) == tokenizer.token_bytes(-1) == b""
    assert tokenizer.decode([-1, tokenizer.vocab_size, 10**9]) == ""


def test_a_lone_surrogate_is_a_value_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="surrogate"):
        tokenizer.encode("bad \ud800 text")


def test_every_token_has_bytes_that_its_text_shows(tokenizer: Tokenizer) -> None:
    for i in random.Random(0).sample(range(tokenizer.vocab_size), 400):
        text, data = tokenizer.token_text(i), tokenizer.token_bytes(i)
        if text.startswith("bytes:"):
            assert bytes.fromhex(text.removeprefix("bytes:").replace("\\x", "")) == data
        else:
            assert text.encode() == data
