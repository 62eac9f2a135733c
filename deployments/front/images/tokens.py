"""The tokens that stand for an image, in the chat format of Llama 4."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from deployments.front.images.errors import ImageError
from deployments.front.images.tiles import PreparedImage


class Encoder(Protocol):
    """What is needed of a tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]: ...


@dataclass(frozen=True)
class ImageTokens:
    """Ids of the special tokens around and inside an image.

    image: before the tile that shows the whole image; alone, in a rendered chat template, the place of an image.
    patch: stands for one embedding.
    tile_x, tile_y: between tiles of a row; after each row.
    """

    start: int
    end: int
    image: int
    patch: int
    tile_x: int
    tile_y: int

    @classmethod
    def of(cls, tokenizer: Encoder) -> "ImageTokens":
        """As the tokenizer names them. Raises ValueError if it lacks one."""
        return cls(
            start=_only_id(tokenizer, "<|image_start|>"),
            end=_only_id(tokenizer, "<|image_end|>"),
            image=_only_id(tokenizer, "<|image|>"),
            patch=_only_id(tokenizer, "<|patch|>"),
            tile_x=_only_id(tokenizer, "<|tile_x_separator|>"),
            tile_y=_only_id(tokenizer, "<|tile_y_separator|>"),
        )


def _only_id(tokenizer: Encoder, name: str) -> int:
    ids = tokenizer.encode(name, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(f"the tokenizer has no token {name}, which a model that sees images needs")
    return ids[0]


@dataclass(frozen=True)
class ImagePlace:
    """Where an image is in a prompt.

    image: the tiles.
    patches: positions in the prompt of its patch tokens, in the order of the tiles' embeddings.
    """

    image: PreparedImage
    patches: tuple[int, ...]


def image_sequence(image: PreparedImage, tokens: ImageTokens, tokens_per_tile: int) -> list[int]:
    """All tokens of one image, from `<|image_start|>` to `<|image_end|>`."""
    tile = [tokens.patch] * tokens_per_tile
    row = [*tile, *[tokens.tile_x, *tile] * (image.columns - 1), tokens.tile_y]
    rows = row * image.rows if len(image.tiles) > 1 else []
    return [tokens.start, *rows, tokens.image, *tile, tokens.end]


def place_images(
    prompt: Sequence[int], images: Sequence[PreparedImage], tokens: ImageTokens, tokens_per_tile: int
) -> tuple[list[int], list[ImagePlace]]:
    """Replaces each `<|image|>` of an encoded prompt by the tokens of an image, in order.

    Returns the whole prompt and where the images are in it. Raises ImageError unless there are as
    many images as places: a client's own text may spell `<|image|>`.
    """
    num_places = sum(token == tokens.image for token in prompt)
    if num_places != len(images):
        raise ImageError(f"the conversation has {len(images)} images, but places for {num_places}")
    ids: list[int] = []
    places: list[ImagePlace] = []
    left = iter(images)
    for token in prompt:
        if token != tokens.image:
            ids.append(token)
            continue
        image = next(left)
        sequence = image_sequence(image, tokens, tokens_per_tile)
        patches = tuple(len(ids) + i for i, member in enumerate(sequence) if member == tokens.patch)
        places.append(ImagePlace(image, patches))
        ids += sequence
    return ids, places
