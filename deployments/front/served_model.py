"""One model as the front serves it."""

import time
from dataclasses import dataclass, field

from deployments.front.chat_template import ChatTemplate
from deployments.front.engine_client import EngineClient
from deployments.front.images import ImageReader
from deployments.front.protocol.response import ModelCard
from deployments.front.tokenizer import Tokenizer


@dataclass(frozen=True)
class ServedModel:
    """`max_model_len`: most tokens of a prompt and its answer together. `vocab_size`: the
    network's, which may exceed the tokenizer's. `images`: None when it sees none. `root`: where the checkpoint is."""

    id: str
    tokenizer: Tokenizer
    engine: EngineClient
    max_model_len: int
    vocab_size: int
    chat_template: ChatTemplate | None = None
    images: ImageReader | None = None
    root: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def card(self) -> ModelCard:
        return ModelCard(
            id=self.id,
            created=self.created,
            owned_by="moray",
            root=self.root or self.id,
            max_model_len=self.max_model_len,
        )
