"""The vocabulary of a GGUF file against transformers (byte-level) and the SentencePiece model it was written from."""

import time
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from deployments.front.chat_template import ChatTemplate
from deployments.front.tokenizer import Tokenizer, TokenizerError, open_tokenizer


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Tokenizer:
    return open_tokenizer(str(smollm2_path))


@pytest.fixture(scope="module")
def oracle(smollm2_path: Path) -> Any:
    """transformers' reading of the same file, with the cut of SmolLM2's own `tokenizer.json`.

    From a GGUF file transformers 5.23 takes GPT-2's cut for every model it has no regex for; SmolLM2 splits digits.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def test_smollm2_encodes_and_decodes_as_transformers_does(smollm2: Tokenizer, oracle: Any, texts: list[str]) -> None:
    chat = "<|im_start|>user\nHi <|im_end|>\n<|im_start|>assistant\n<|endoftext|> <file_sep>x"
    for text in [*texts, chat]:
        ids = oracle.encode(text)
        assert smollm2.encode(text) == ids
        for skip in (True, False):
            expected = oracle.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert smollm2.decode(ids, skip_special_tokens=skip) == expected


@settings(max_examples=400, deadline=None)
@given(
    text=st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\t019'sélL.")), max_size=60)
)
def test_smollm2_encodes_any_text_as_transformers_does(smollm2: Tokenizer, oracle: Any, text: str) -> None:
    assert smollm2.encode(text) == oracle.encode(text)


def test_smollm2_facts(smollm2: Tokenizer, oracle: Any) -> None:
    assert smollm2.vocab_size == 49152 == len(oracle)
    assert (smollm2.bos_token_id, smollm2.eos_token_ids) == (1, (2,))
    assert smollm2.special_ids == {i for i, token in oracle.added_tokens_decoder.items() if token.special}
    assert smollm2.special_tokens == {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
    }
    assert smollm2.chat_template == oracle.chat_template


def test_smollm2_reads_a_chat_as_transformers_does(smollm2: Tokenizer, oracle: Any) -> None:
    template = ChatTemplate(smollm2.chat_template or "", smollm2.special_tokens)
    question = [{"role": "user", "content": "What is 12 x  34?\n<|im_end|> größer 😀"}]
    for messages in (question, [{"role": "system", "content": "Be brief."}, *question]):
        ids = smollm2.encode(template.render(messages), add_special_tokens=False)
        assert ids == oracle.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def test_smollm2_opens_well_within_a_second(smollm2_path: Path) -> None:
    """About 0.2 s of CPU; `gguf.GGUFReader` alone took more than two."""

    def seconds() -> float:
        start = time.process_time()
        open_tokenizer(str(smollm2_path))
        return time.process_time() - start

    assert min(seconds() for _ in range(3)) < 1.0


def byte_level_file(path: Path, **changes: Any) -> str:
    """A GGUF file with a vocabulary of a few tokens and no tensors."""
    keys = {"model": "gpt2", "pre": "gpt-2", "bos": 0, "eos": 1, **changes}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(keys["model"])
    writer.add_tokenizer_pre(keys["pre"])
    tokens = ["<s>", "</s>", "<think>", *alphabet, "he", "Ġ0"]
    types = [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.USER_DEFINED] + [gguf.TokenType.NORMAL] * (len(alphabet) + 2)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if keys.get("merges", True):
        writer.add_token_merges(["h e", "Ġ 0"])
    writer.add_bos_token_id(keys["bos"])
    writer.add_eos_token_id(keys["eos"])
    for name in ("add_bos_token", "add_eos_token"):
        if name in keys:
            getattr(writer, name.replace("add_", "add_add_"))(keys[name])
    if "eot" in keys:
        writer.add_eot_token_id(keys["eot"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return str(path)


def test_ends_are_written_as_the_file_says(tmp_path: Path) -> None:
    neither = open_tokenizer(byte_level_file(tmp_path / "a.gguf"))
    both = open_tokenizer(byte_level_file(tmp_path / "b.gguf", add_bos_token=True, add_eos_token=True))
    plain = neither.encode("he")
    assert neither.decode(plain) == "he"
    assert len(plain) == 1
    assert both.encode("he") == [0, *plain, 1]
    assert both.encode("he", add_special_tokens=False) == plain
    llama3 = open_tokenizer(byte_level_file(tmp_path / "c.gguf", pre="llama-bpe"))
    assert llama3.encode("he") == [0, *plain]
    assert open_tokenizer(byte_level_file(tmp_path / "d.gguf", eot=2)).eos_token_ids == (1, 2)


def test_pre_tokenizers_differ_where_they_should(tmp_path: Path) -> None:
    def tokens(pre: str, text: str) -> list[str]:
        tokenizer = open_tokenizer(byte_level_file(tmp_path / f"{pre}.gguf", pre=pre))
        return [tokenizer.token_text(i) for i in tokenizer.encode(text, add_special_tokens=False)]

    assert tokens("gpt-2", "a 0") == ["a", " 0"]
    assert tokens("smollm", "a 0") == ["a", " ", "0"]
    assert tokens("qwen2", "a 0") == ["a", " ", "0"]
    assert tokens("llama4", "<think>he") == ["<think>", "he"]


def test_what_is_not_supported_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="'deepseek-v9' is not supported"):
        open_tokenizer(byte_level_file(tmp_path / "a.gguf", pre="deepseek-v9"))
    with pytest.raises(TokenizerError, match="'bert' is not supported"):
        open_tokenizer(byte_level_file(tmp_path / "b.gguf", model="bert"))
    with pytest.raises(TokenizerError, match=r"tokenizer\.ggml\.merges is missing"):
        open_tokenizer(byte_level_file(tmp_path / "c.gguf", merges=False))


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    whole = Path(byte_level_file(tmp_path / "whole.gguf")).read_bytes()
    for size in (10, 30, 100, len(whole) - 3):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(TokenizerError, match="GGUF"):
            open_tokenizer(str(tmp_path / "cut.gguf"))


@pytest.mark.parametrize("add_space_prefix", [True, False])
def test_a_llama_vocabulary_encodes_as_the_model_it_came_from(
    sentencepiece_model: Path, tmp_path: Path, texts: list[str], add_space_prefix: bool
) -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    path = tmp_path / "spm.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    size = theirs.vocab_size()
    writer.add_token_list([theirs.id_to_piece(i) for i in range(size)])
    writer.add_token_scores([theirs.get_score(i) for i in range(size)])
    user = theirs.piece_to_id("<tool>")
    kinds = {0: gguf.TokenType.UNKNOWN, 1: gguf.TokenType.CONTROL, 2: gguf.TokenType.CONTROL}
    writer.add_token_types(
        [
            gguf.TokenType.BYTE
            if theirs.is_byte(i)
            else gguf.TokenType.USER_DEFINED
            if i == user
            else kinds.get(i, gguf.TokenType.NORMAL)
            for i in range(size)
        ]
    )
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_space_prefix(add_space_prefix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()

    ours = open_tokenizer(str(path))
    assert (ours.bos_token_id, ours.eos_token_ids, ours.vocab_size) == (1, (2,), size)
    if add_space_prefix:
        for text in [*texts, "a <tool>b"]:
            assert ours.encode(text) == [1, *theirs.encode(text)]
    else:
        assert ours.decode(ours.encode(" a")) == " a"
        assert ours.decode(ours.encode("a")) == "a"
        assert ours.token_text(ours.encode("a")[1]) == "a"
