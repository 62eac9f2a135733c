"""The cuts of byte-level vocabularies, made by `tokenizers`, against the same expressions run by `regex`."""

import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from deployments.front.tokenizer.pre_tokenizer import GPT2, LLAMA3, LLAMA4, QWEN2, TEKKEN, pre_tokenizer_of

TEXT = st.text(
    st.one_of(st.characters(exclude_categories=["Cs", "Cn"]), st.sampled_from(" \n\r\t0'sSlLeé!/")), max_size=40
)


def check(cut: str, text: str) -> None:
    pieces = pre_tokenizers.Split(Regex(cut), behavior="isolated").pre_tokenize_str(text)
    assert [piece for piece, _ in pieces] == regex.findall(cut, text)


def test_cuts(texts: list[str]) -> None:
    for text in texts:
        for cut in (GPT2, LLAMA3, LLAMA4, QWEN2, TEKKEN):
            check(cut, text)


@settings(max_examples=300, deadline=None)
@given(text=TEXT, cut=st.sampled_from([GPT2, LLAMA3, LLAMA4, QWEN2, TEKKEN]))
def test_cuts_of_any_text(text: str, cut: str) -> None:
    check(cut, text)


def test_gpt2_is_the_cut_of_tokenizers_own_byte_level(texts: list[str]) -> None:
    theirs = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ours = pre_tokenizers.Sequence(pre_tokenizer_of("gpt-2", origin="").steps())
    for text in texts:
        assert ours.pre_tokenize_str(text) == theirs.pre_tokenize_str(text)


def test_default_cuts_punctuation_and_numbers() -> None:
    steps = pre_tokenizers.Sequence(pre_tokenizer_of("default", origin="").steps())
    pieces = [piece for piece, _ in steps.pre_tokenize_str("a=12345, it's")]
    assert pieces == ["a", "=", "123", "45", ",", "Ġit", "'", "s"]
