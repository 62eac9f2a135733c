"""The vocabulary inside a GGUF file, run by `tokenizers` ("gpt2") or `sentencepiece` ("llama")."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from deployments.front.tokenizer.base import Tokenizer, TokenizerError, Vocabulary
from deployments.front.tokenizer.huggingface import HuggingFaceTokenizer
from deployments.front.tokenizer.pieces import byte_level_piece
from deployments.front.tokenizer.pre_tokenizer import pre_tokenizer_of
from deployments.front.tokenizer.sentencepiece import MODEL_FORMAT, build_sentencepiece
from deployments.front.tokenizer.settings import Settings
from model.checkpoint.gguf_file import read_gguf

_NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_ENDS = ("eos", "eot", "eom")


def open_gguf(path: Path) -> Tokenizer:
    """The tokenizer that a GGUF file carries. Raises TokenizerError for a kind that is not supported."""
    metadata = {
        key.removeprefix("tokenizer."): value
        for key, value in read_gguf(path).metadata.items()
        if key.startswith("tokenizer.")
    }
    kind = metadata.get("ggml.model")
    try:
        if kind == "gpt2":
            return _byte_level(path, metadata)
        if kind == "llama":
            return _sentencepiece(path, metadata)
    except KeyError as error:
        raise TokenizerError(f"{path}: the key tokenizer.{error.args[0]} is missing") from error
    raise TokenizerError(f"{path}: tokenizer.ggml.model {kind!r} is not supported ('gpt2' and 'llama' are)")


def _byte_level(path: Path, metadata: Mapping[str, Any]) -> Tokenizer:
    tokens, types = _tokens(metadata)
    pre = pre_tokenizer_of(metadata.get("ggml.pre", "default"), origin=str(path))
    backend = Backend(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ", 1)) for merge in metadata["ggml.merges"]],
            ignore_merges=pre.ignore_merges,
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(pre.steps())
    backend.decoder = decoders.ByteLevel()
    special = {i for i, kind in enumerate(types) if kind in (TokenType.CONTROL, TokenType.UNKNOWN)}
    backend.add_special_tokens([AddedToken(tokens[i], normalized=False, special=True) for i in sorted(special)])
    user = [token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.USER_DEFINED]
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in user])
    settings = _settings(metadata, tokens)
    literal = special | {i for i, kind in enumerate(types) if kind == TokenType.USER_DEFINED}
    vocabulary = settings.vocabulary(
        pieces=[t.encode() if i in literal else byte_level_piece(t) for i, t in enumerate(tokens)],
        special_ids=frozenset(special),
        token_to_id=backend.token_to_id,
        leading_space=False,
    )
    _add_ends(backend, vocabulary, metadata, add_bos=pre.add_bos)
    return HuggingFaceTokenizer(backend, vocabulary)


def _add_ends(backend: Backend, vocabulary: Vocabulary, metadata: Mapping[str, Any], *, add_bos: bool) -> None:
    """Make `add_special_tokens` write BOS and EOS as the file says."""
    ends: dict[str, int] = {}
    template = ["$A"]
    if metadata.get("ggml.add_bos_token", add_bos) and vocabulary.bos_token_id is not None:
        template.insert(0, vocabulary.special_tokens["bos_token"])
        ends[template[0]] = vocabulary.bos_token_id
    if metadata.get("ggml.add_eos_token", False) and "eos_token" in vocabulary.special_tokens:
        template.append(vocabulary.special_tokens["eos_token"])
        ends[template[-1]] = vocabulary.eos_token_ids[0]
    if ends:
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=list(ends.items()))


def _sentencepiece(path: Path, metadata: Mapping[str, Any]) -> Tokenizer:
    """Writes the model file that the vocabulary came from anew. GGUF numbers its token types as SentencePiece does."""
    tokens, types = _tokens(metadata)
    proto = MODEL_FORMAT.ModelProto()
    for token, score, kind in zip(tokens, metadata["ggml.scores"], types, strict=True):
        proto.pieces.add(piece=token, score=score, type=kind)
    proto.trainer_spec.model_type = MODEL_FORMAT.TrainerSpec.BPE
    proto.trainer_spec.byte_fallback = TokenType.BYTE in types
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = metadata.get("ggml.add_space_prefix", True)
    proto.normalizer_spec.remove_extra_whitespaces = metadata.get("ggml.remove_extra_whitespaces", False)
    return build_sentencepiece(
        proto.SerializeToString(),
        _settings(metadata, tokens),
        origin=str(path),
        add_bos=metadata.get("ggml.add_bos_token", True),
        add_eos=metadata.get("ggml.add_eos_token", False),
    )


def _tokens(metadata: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """Spellings and types of the tokens."""
    tokens = list(metadata["ggml.tokens"])
    types = list(metadata.get("ggml.token_type", [TokenType.NORMAL] * len(tokens)))
    return tokens, types


def _settings(metadata: Mapping[str, Any], tokens: list[str]) -> Settings:
    ids = {name: metadata.get(f"ggml.{key}_token_id") for name, key in _NAMES.items()}
    ends = (metadata.get(f"ggml.{key}_token_id") for key in _ENDS)
    return Settings(
        special_tokens={name: tokens[i] for name, i in ids.items() if i is not None and i < len(tokens)},
        eos_token_ids=tuple(dict.fromkeys(i for i in ends if i is not None)),
        chat_template=metadata.get("chat_template"),
    )
