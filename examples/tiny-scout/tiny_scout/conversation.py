"""Dialogues and pictures as the model sees them, made by the code that serves: template, tokens, tiles, places."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deployments.front.chat_template import ChatTemplate
from deployments.front.images import ImageSettings, ImageTokens, PreparedImage, place_images
from deployments.front.tokenizer import Tokenizer
from model import LLM, TransformerInput
from model.datatypes import MaskedEmbedding
from model.vision.pixels import normalize_pixels
from tiny_scout.dialogues import Dialogue

NO_LABEL = -100
MAX_TILES = 1
"""Digits of 8 by 8 pixels hide nothing in a tile of 32 by 32."""


@dataclass(frozen=True)
class Conversation:
    """ids: the prompt, images placed. learned: which of them the model is to predict."""

    ids: list[int]
    images: Sequence[PreparedImage]
    learned: list[bool]


class ChatFormat:
    """From dialogues to tokens."""

    def __init__(self, tokenizer: Tokenizer, tokens_per_tile: int) -> None:
        if tokenizer.chat_template is None:
            raise ValueError("the tokenizer has no chat template")
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens)
        self.image_tokens = ImageTokens.of(tokenizer)
        self.tokens_per_tile = tokens_per_tile
        self.end = tokenizer.eos_token_ids[0]
        self._answer_starts = self._encode("<|header_start|>assistant<|header_end|>\n\n")

    def conversation(
        self, dialogue: Dialogue, images: Sequence[PreparedImage], *, with_answers: bool = True
    ) -> Conversation:
        """with_answers False: the prompt for the last answer."""
        messages = dialogue.messages(with_answers=with_answers)
        text = self.template.render(messages, add_generation_prompt=not with_answers)
        ids, _ = place_images(self._encode(text), images, self.image_tokens, self.tokens_per_tile)
        return Conversation(ids, images, self._learned(ids))

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _learned(self, ids: list[int]) -> list[bool]:
        """True from after an assistant's header to the token that ends the turn."""
        learned, inside, start = [], False, self._answer_starts
        for i, token in enumerate(ids):
            learned.append(inside)
            inside = (inside and token != self.end) or ids[max(i + 1 - len(start), 0) : i + 1] == start
        return learned


@dataclass(frozen=True)
class Batch:
    """Conversations padded to a rectangle.

    tokens: int64 [batch, length]; labels: the tokens to predict, NO_LABEL elsewhere; lengths: int64 [batch].
    image_mask: bool [batch, length, 1]; pixels: for each row its images, each [tiles, 3, height, width].
    """

    tokens: Tensor
    labels: Tensor
    lengths: Tensor
    image_mask: Tensor
    pixels: list[list[Tensor]]

    @classmethod
    def of(cls, conversations: Sequence[Conversation], patch_token: int) -> "Batch":
        lengths = torch.tensor([len(conversation.ids) for conversation in conversations])
        shape = (len(conversations), int(lengths.max()))
        tokens, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, NO_LABEL)
        for row, conversation in enumerate(conversations):
            ids = torch.tensor(conversation.ids)
            tokens[row, : len(ids)] = ids
            labels[row, : len(ids)] = torch.where(torch.tensor(conversation.learned), ids, NO_LABEL)
        pixels = [[normalize_pixels(torch.from_numpy(image.tiles)) for image in c.images] for c in conversations]
        return cls(tokens, labels, lengths, (tokens == patch_token)[..., None], pixels)


def model_input(model: LLM, batch: Batch) -> TransformerInput:
    """The batch with its images encoded by the model."""
    seen = None
    if any(batch.pixels):
        embedding = model.vision_embeddings(batch.pixels, batch.image_mask, model.tok_embeddings(batch.tokens))
        seen = MaskedEmbedding(embedding, batch.image_mask)
    return TransformerInput(batch.tokens, 0, seen)


def image_settings(model: LLM) -> ImageSettings:
    """How images are cut for `model`."""
    if model.args.vision_args is None:
        raise ValueError("the model sees no images")
    return ImageSettings.of(model.args.vision_args, max_tiles=MAX_TILES)
