"""Meta's `tokenizer.model` of Llama 3 and Llama 4: tiktoken's base64 lines, with special tokens that only code knows.

Which of the two it is follows from the number of its lines. Meta ships no chat template with these
files either; the ones here write what `llama_models`' `ChatFormat` writes for text.
"""

import base64
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tiktoken

from deployments.front.tokenizer.base import Tokenizer, TokenizerError, Vocabulary
from deployments.front.tokenizer.pre_tokenizer import LLAMA3, LLAMA4

_SPECIAL = re.compile(r"(<\|[a-z0-9_]+\|>)")
_LONGEST_RUN = 25_000
"""Characters of one run of (non-)whitespace in one call: tiktoken's regular expression fails on much longer ones."""

_TEMPLATE = """\
{%% if tools %%}{{ raise_exception('no chat template for tools; configure one') }}{%% endif %%}
{{- bos_token }}
{%%- for message in messages %%}
    {%%- if message.tool_calls %%}{{ raise_exception('no chat template for tool calls; configure one') }}{%% endif %%}
    {%%- if message.content is not string %%}{{ raise_exception('content must be text') }}{%% endif %%}
    {%%- set tool = message.role == 'tool' %%}
    {{- '%(start)s' + ('ipython' if tool else message.role) + '%(end)s\\n\\n' + message.content | trim }}
    {{- '%(after_tool)s' if tool else '%(after)s' }}
{%%- endfor %%}
{%%- if add_generation_prompt %%}{{ '%(start)sassistant%(end)s\\n\\n' }}{%% endif %%}
"""
_LLAMA3_TEMPLATE = _TEMPLATE % {
    "start": "<|start_header_id|>",
    "end": "<|end_header_id|>",
    "after": "<|eot_id|>",
    "after_tool": "<|eot_id|>",
}
_LLAMA4_TEMPLATE = _TEMPLATE % {
    "start": "<|header_start|>",
    "end": "<|header_end|>",
    "after": "<|eot|>",
    "after_tool": "<|eom|>",
}


@dataclass(frozen=True)
class Generation:
    """What a generation of Llama adds to its file.

    special_tokens: in the order of their ids, from the first after the file's tokens.
    ends: those that end an answer; the first of them is `eos_token`.
    """

    cut: str
    special_tokens: tuple[str, ...]
    ends: tuple[str, ...]
    pad_token: str
    chat_template: str


def _reserved(prefix: str, start: int, stop: int) -> list[str]:
    return [f"<|{prefix}reserved_special_token_{i}|>" for i in range(start, stop)]


def _angled(*names: str) -> list[str]:
    return [f"<|{name}|>" for name in names]


def _llama3() -> Generation:
    special = [
        *_angled("begin_of_text", "end_of_text"),
        *_reserved("", 0, 2),
        *_angled("finetune_right_pad_id", "step_id", "start_header_id", "end_header_id", "eom_id", "eot_id"),
        *_angled("python_tag", "image"),
        *_reserved("", 2, 246),
    ]
    ends = tuple(_angled("end_of_text", "eom_id", "eot_id"))
    return Generation(LLAMA3, tuple(special), ends, "<|finetune_right_pad_id|>", _LLAMA3_TEMPLATE)


def _llama4() -> Generation:
    special = [
        *_angled("begin_of_text", "end_of_text", "fim_prefix", "fim_middle", "fim_suffix"),
        *_angled("header_start", "header_end", "eom", "eot", "step"),
        *_reserved("text_post_train_", 0, 6),
        *_angled("python_start", "python_end", "finetune_right_pad"),
        *_reserved("text_post_train_", 8, 69),
        *_angled("image_start", "image_end"),
        *_reserved("vision_", 0, 2),
        *_angled("tile_x_separator", "tile_y_separator"),
        *_reserved("vision_", 2, 6),
        "<|image|>",
        *_reserved("vision_", 6, 7),
        "<|patch|>",
        *_reserved("vision_", 7, 1048),
        *_reserved("reasoning_", 0, 8),
        *_angled("reasoning_thinking_start", "reasoning_thinking_end"),
    ]
    special += _reserved("", 0, 2048 - len(special))
    ends = tuple(_angled("end_of_text", "eom", "eot"))
    return Generation(LLAMA4, tuple(special), ends, "<|finetune_right_pad|>", _LLAMA4_TEMPLATE)


_GENERATIONS = {128_000: _llama3, 200_000: _llama4}


class TiktokenTokenizer(Tokenizer):
    """A tiktoken encoding. Special tokens are found here, so that long text can be fed to it in parts."""

    def __init__(self, encoding: tiktoken.Encoding, special: dict[str, int], vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary)
        self._encoding = encoding
        self._special = special

    def _encode(self, text: str, add_special_tokens: bool, parse_special: bool) -> list[int]:
        ids = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        if not parse_special:
            return ids + self._ordinary(text)
        for is_special, parts in itertools.groupby(_SPECIAL.split(text), key=self._special.__contains__):
            if is_special:
                ids += [self._special[part] for part in parts]
            else:
                ids += self._ordinary("".join(parts))
        return ids

    def _ordinary(self, text: str) -> list[int]:
        return [i for part in _parts(text) for i in self._encoding.encode_ordinary(part)]


def open_tiktoken(path: Path) -> TiktokenTokenizer:
    """The tokenizer of a Meta `tokenizer.model`. Raises TokenizerError when it is of neither Llama 3 nor Llama 4."""
    ranks = _read_ranks(path)
    if len(ranks) not in _GENERATIONS:
        raise TokenizerError(f"{path}: {len(ranks)} tokens; Llama 3 has 128000 and Llama 4 has 200000")
    generation = _GENERATIONS[len(ranks)]()
    special = {token: len(ranks) + i for i, token in enumerate(generation.special_tokens)}
    encoding = tiktoken.Encoding(name=path.name, pat_str=generation.cut, mergeable_ranks=ranks, special_tokens=special)
    vocabulary = Vocabulary(
        pieces=[*sorted(ranks, key=ranks.__getitem__), *(token.encode() for token in special)],
        special_ids=frozenset(special.values()),
        bos_token_id=special["<|begin_of_text|>"],
        eos_token_ids=tuple(special[token] for token in generation.ends),
        special_tokens={
            "bos_token": "<|begin_of_text|>",
            "eos_token": generation.ends[0],
            "pad_token": generation.pad_token,
        },
        chat_template=generation.chat_template,
    )
    return TiktokenTokenizer(encoding, special, vocabulary)


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token)] = int(rank)
        except ValueError as error:
            raise TokenizerError(f"{path}, line {number}: not a base64 token and its rank: {error}") from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise TokenizerError(f"{path}: the ranks are not 0 to {len(ranks) - 1}, each once")
    return ranks


_LONG_RUN = re.compile(rf"(?<!\s)\s{{{_LONGEST_RUN + 1},}}|(?<!\S)\S{{{_LONGEST_RUN + 1},}}")
"""Tried only where a run begins: from every place in it, runs just short of the limit would take quadratic time."""


def _parts(text: str) -> Iterator[str]:
    """Cuts runs of whitespace, or of anything else, that are longer than tiktoken takes."""
    start = 0
    for run in _LONG_RUN.finditer(text):
        for cut in range(run.start() + _LONGEST_RUN, run.end(), _LONGEST_RUN):
            yield text[start:cut]
            start = cut
    yield text[start:]
