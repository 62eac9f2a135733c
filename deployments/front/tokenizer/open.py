"""Finds out which kind of tokenizer a location holds."""

from pathlib import Path

from deployments.front.tokenizer.base import Tokenizer, TokenizerError
from deployments.front.tokenizer.gguf import open_gguf
from deployments.front.tokenizer.huggingface import open_huggingface
from deployments.front.tokenizer.sentencepiece import open_sentencepiece
from deployments.front.tokenizer.tiktoken import open_tiktoken
from model.checkpoint.errors import CheckpointError
from model.checkpoint.hub import TOKENIZER_FILES, local_path


def open_tokenizer(location: str) -> Tokenizer:
    """The tokenizer at a GGUF file, a `tokenizer.json`, a `tokenizer.model`, a folder with one, or
    `hf://org/name[@revision]`.

    Raises TokenizerError that names the location and what is wrong with it.
    """
    try:
        return _open(local_path(location, TOKENIZER_FILES))
    except CheckpointError as error:
        raise TokenizerError(str(error)) from error


def _open(path: Path) -> Tokenizer:
    if path.is_dir():
        return _open(_file_of(path))
    if not path.is_file():
        raise TokenizerError(f"{path}: no such file or folder")
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"GGUF"):
        return open_gguf(path)
    if path.suffix == ".json":
        return open_huggingface(path)
    return open_tiktoken(path) if _is_tiktoken(start) else open_sentencepiece(path)


def _file_of(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer.model"):
        if (folder / name).is_file():
            return folder / name
    files = sorted(folder.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    found = f"{len(files)} GGUF files" if files else "none of them"
    raise TokenizerError(f"{folder}: wants a tokenizer.json, a tokenizer.model or one GGUF file; it has {found}")


def _is_tiktoken(start: bytes) -> bool:
    """Lines of base64 and a rank, where a SentencePiece model is a protobuf that starts with "\\n"."""
    first = start.split(b"\n", 1)[0].split(b" ")
    return len(first) == 2 and first[1].strip().isdigit()
