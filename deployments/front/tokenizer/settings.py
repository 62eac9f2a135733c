"""What Hugging Face keeps beside a tokenizer: special tokens, end-of-answer tokens, the chat template."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deployments.front.tokenizer.base import TokenizerError, Vocabulary

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Settings:
    """The settings of one folder; all empty where it has none.

    eos_token_ids: from `generation_config.json`, else `config.json`.
    added_tokens: id -> (text, special), from `tokenizer_config.json`.
    """

    special_tokens: Mapping[str, str] = field(default_factory=dict)
    eos_token_ids: tuple[int, ...] = ()
    chat_template: str | None = None
    added_tokens: Mapping[int, tuple[str, bool]] = field(default_factory=dict)

    def vocabulary(
        self,
        *,
        pieces: Sequence[bytes],
        special_ids: frozenset[int],
        token_to_id: Callable[[str], int | None],
        leading_space: bool,
    ) -> Vocabulary:
        """These settings applied to a vocabulary."""
        named = {name: token_to_id(token) for name, token in self.special_tokens.items()}
        eos = named.get("eos_token")
        return Vocabulary(
            pieces=pieces,
            special_ids=special_ids,
            bos_token_id=named.get("bos_token"),
            eos_token_ids=tuple(dict.fromkeys((*(() if eos is None else (eos,)), *self.eos_token_ids))),
            special_tokens=self.special_tokens,
            chat_template=self.chat_template,
            leading_space=leading_space,
        )


def read_settings(folder: Path) -> Settings:
    """The settings in a folder. Raises TokenizerError naming a file that is not JSON."""
    config = _json(folder / "tokenizer_config.json")
    tokens = {**_json(folder / "special_tokens_map.json"), **config}
    return Settings(
        special_tokens={name: _text(tokens[name]) for name in _SPECIAL_TOKENS if tokens.get(name) is not None},
        eos_token_ids=_eos_token_ids(folder),
        chat_template=_chat_template(folder, config),
        added_tokens={
            int(i): (token["content"], bool(token.get("special")))
            for i, token in config.get("added_tokens_decoder", {}).items()
        },
    )


def _eos_token_ids(folder: Path) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        config = _json(folder / name)
        ids = config.get("eos_token_id", config.get("text_config", {}).get("eos_token_id"))
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (ids,)
    return ()


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """`chat_template.jinja`, else `chat_template.json`, else the configuration's; of several the "default"."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = _json(folder / "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _text(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise TokenizerError(f"{path}: not a JSON object: {error}") from error
