"""Finds out which kind of tokenizer a location holds."""

from pathlib import Path

from deployments.front.tokenizer.base import Tokenizer, TokenizerError
from deployments.front.tokenizer.gguf import open_gguf
from deployments.front.tokenizer.huggingface import open_huggingface
from deployments.front.tokenizer.sentencepiece import open_sentencepiece
from deployments.front.tokenizer.tiktoken import open_tiktoken

_HUB = "hf://"
_HUB_FILES = ["tokenizer*", "special_tokens_map.json", "chat_template*", "config.json", "generation_config.json"]


def open_tokenizer(location: str) -> Tokenizer:
    """The tokenizer at a GGUF file, a `tokenizer.json`, a `tokenizer.model`, a folder with one, or `hf://org/name`.

    Raises TokenizerError that names the location and what is wrong with it.
    """
    if location.startswith(_HUB):
        return _open(_download(location))
    return _open(Path(location))


def _download(location: str) -> Path:
    from huggingface_hub import snapshot_download  # a fifth of a second that only these locations need

    try:
        return Path(snapshot_download(location.removeprefix(_HUB), allow_patterns=_HUB_FILES))
    except (OSError, ValueError) as error:  # the hub's HTTP errors are OSErrors, its name checks ValueErrors
        raise TokenizerError(f"{location}: {error}") from error


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
