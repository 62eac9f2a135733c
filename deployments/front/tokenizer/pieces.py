"""The exact bytes behind the spellings that vocabularies use for their tokens."""

import re
from collections.abc import Iterable

SPACE = "\u2581"
"""How SentencePiece spells a space."""

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[int, int]:
    """GPT-2's alphabet: the code point that spells a byte -> that byte. Printable bytes spell themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {code: code for code in printable} | {256 + i: byte for i, byte in enumerate(others)}


_BYTES = _byte_alphabet()
BYTE_ALPHABET = frozenset(map(chr, _BYTES))


def byte_level_piece(token: str) -> bytes:
    """Bytes of a token of a byte-level vocabulary; one with characters outside its alphabet stands for itself."""
    if BYTE_ALPHABET.issuperset(token):
        return token.translate(_BYTES).encode("latin-1")
    return token.encode()


def sentencepiece_piece(token: str, space: str = SPACE) -> bytes:
    """Bytes of a token of a SentencePiece vocabulary; "<0x0A>" is the byte 10."""
    if byte := _BYTE.fullmatch(token):
        return bytes([int(byte[1], 16)])
    return token.replace(space, " ").encode()


def table(pieces: Iterable[tuple[int, bytes]]) -> list[bytes]:
    """Pieces by id; ids that no piece has are empty."""
    by_id = dict(pieces)
    return [by_id.get(i, b"") for i in range(max(by_id, default=-1) + 1)]
