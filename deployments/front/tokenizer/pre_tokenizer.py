"""How byte-level vocabularies cut text before merging, under the names GGUF files use (`tokenizer.ggml.pre`).

The regular expressions are those of the models' own `tokenizer.json`; the names are llama.cpp's
(`src/llama-vocab.cpp`). A wrong cut gives a model text it was never trained on, so an unknown name is refused.
"""

from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, pre_tokenizers

from deployments.front.tokenizer.base import TokenizerError

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
    r"|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
LLAMA4 = _CASED % (_CONTRACTION, _CONTRACTION, "{1,3}")
TEKKEN = _CASED % ("", "", "")


@dataclass(frozen=True)
class PreTokenizer:
    """cuts: regular expressions applied one after another, each to the pieces of the last.

    ignore_merges: a piece that is a token as a whole becomes that token, whatever the merges give.
    add_bos: whether a BOS token goes first where the file does not say.
    """

    cuts: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False

    def steps(self) -> list[Any]:
        """For `tokenizers.pre_tokenizers.Sequence`."""
        cuts = [pre_tokenizers.Split(Regex(cut), behavior="isolated") for cut in self.cuts]
        return [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


_DEFAULT = PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))
_GPT2 = PreTokenizer((GPT2,))
_DIGITS = PreTokenizer((r"\p{N}", GPT2))
_LLAMA3 = PreTokenizer((LLAMA3,), ignore_merges=True, add_bos=True)
_LLAMA4 = PreTokenizer((LLAMA4,), add_bos=True)
_QWEN2 = PreTokenizer((QWEN2,))
_TEKKEN = PreTokenizer((TEKKEN,), ignore_merges=True, add_bos=True)

_BY_NAME = {
    "default": _DEFAULT,
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), PreTokenizer((LLAMA3,))),
    "llama4": _LLAMA4,
    "gpt-4o": PreTokenizer((LLAMA4,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), _QWEN2),
    "tekken": _TEKKEN,
}


def pre_tokenizer_of(name: str, *, origin: str) -> PreTokenizer:
    """The cutting that goes by this name. Raises TokenizerError naming it and `origin` when there is none."""
    if name not in _BY_NAME:
        known = ", ".join(sorted(_BY_NAME))
        raise TokenizerError(f"{origin}: tokenizer.ggml.pre {name!r} is not supported (known: {known})")
    return _BY_NAME[name]
