"""How images are read: the model's own sizes, and limits."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model.args import VisionArgs  # not at run time: it would bring torch into the front


@dataclass(frozen=True)
class ImageSettings:
    """tile_size: side of a tile, in pixels.
    tokens_per_tile: patch tokens that stand for a tile.
    max_tiles: most tiles of one image, the global one not counted; Llama 4 was trained with 16.
    max_bytes: of an encoded image. max_pixels: of a decoded one, before it is resized.
    """

    tile_size: int
    tokens_per_tile: int
    max_tiles: int = 16
    max_bytes: int = 20 * 2**20
    max_pixels: int = 50_000_000

    def __post_init__(self) -> None:
        for name in ("tile_size", "tokens_per_tile", "max_tiles", "max_bytes", "max_pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    @classmethod
    def of(cls, args: "VisionArgs", **limits: int) -> "ImageSettings":
        """The settings for a model. Raises ValueError if its tiles are not square."""
        size = args.image_size
        if size.height != size.width:
            raise ValueError(f"tiles must be square, the model's are {size.height} by {size.width}")
        return cls(tile_size=size.width, tokens_per_tile=args.tokens_per_tile, **limits)
