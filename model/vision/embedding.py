"""From tiles of images to embeddings at the places of their tokens.

Owns what lies between the encoder's patches and the text model's image tokens: several patches
become one token (pixel shuffle), and tokens find their places in the batch.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.args import VisionArgs
from model.vision.encoder import GELUFeedForward, VisionEncoder


def pixel_shuffle(patches: Tensor, grid: tuple[int, int], shuffle: int) -> Tensor:
    """Squares of `shuffle` by `shuffle` patches become one of as many times the channels.

    patches: [tiles, rows * columns, channels] -> [tiles, rows * columns / shuffle**2, channels * shuffle**2].
    """
    rows, columns = grid
    squares = patches.unflatten(1, (rows // shuffle, shuffle, columns // shuffle, shuffle))
    return squares.transpose(2, 3).flatten(3).flatten(1, 2)


class PixelShuffleMLP(nn.Module):
    """The adapter: pixel shuffle, then two layers, a GELU after each."""

    def __init__(self, args: VisionArgs) -> None:
        super().__init__()
        self.grid, self.shuffle = args.grid, args.shuffle
        self.mlp = GELUFeedForward(args.dim * args.shuffle**2, args.output_dim, args.output_dim, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        """patches: [tiles, patches, dim] -> [tiles, tokens_per_tile, output_dim]."""
        return F.gelu(self.mlp(pixel_shuffle(patches, self.grid, self.shuffle)))


class VisionEmbeddings(nn.Module):
    """Tiled images to embeddings scattered over a batch of tokens, for `TransformerInput.image_embedding`."""

    def __init__(self, args: VisionArgs) -> None:
        super().__init__()
        self.args = args
        self.vision_encoder = VisionEncoder(args)
        self.vision_adapter = PixelShuffleMLP(args)

    @torch.no_grad()
    def initialize_parameters(self) -> None:
        """The adapter keeps the scale of its input, having no norm; where a block adds to its stream, less is better.

        Everything else is normal with deviation 0.02, as in the text model.
        """
        for name, parameter in self.named_parameters():
            if "vision_adapter" in name:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            elif name.endswith(("wo.weight", "c_proj.weight")):
                parameter.normal_(std=0.02 / (2 * self.args.n_layers) ** 0.5)
            elif parameter.dim() > 1 or name.endswith("class_embedding"):
                parameter.normal_(std=0.02)

    def embed(self, pixels: Tensor) -> Tensor:
        """pixels: [tiles, 3, height, width], -1 to 1 -> [tiles, tokens_per_tile, output_dim]."""
        return self.vision_adapter(self.vision_encoder(pixels))

    def forward(self, image_batch: Sequence[Sequence[Tensor]], image_mask: Tensor, h_ref: Tensor) -> Tensor:
        """Embeddings of images where `image_mask` is True, zeros elsewhere.

        image_batch: for every row its images in order, each [tiles, 3, height, width], -1 to 1.
        image_mask: bool [batch, length, 1], True at image tokens.
        h_ref: [batch, length, ...], the token embeddings, for their dtype and device.
        Returns [batch, length, output_dim]. ValueError when a row has more or fewer image tokens
        than its images make.
        """
        self._check_places(image_batch, image_mask)
        empty = h_ref.new_zeros(*h_ref.shape[:2], self.args.output_dim)
        tiles = [image for images in image_batch for image in images]
        if not tiles:
            return empty
        embeddings = self.embed(torch.cat(tiles).to(empty))
        return empty.masked_scatter(image_mask, embeddings)

    def _check_places(self, image_batch: Sequence[Sequence[Tensor]], image_mask: Tensor) -> None:
        if len(image_batch) != len(image_mask):
            raise ValueError(f"images of {len(image_batch)} rows for a batch of {len(image_mask)}")
        for row, (images, mask) in enumerate(zip(image_batch, image_mask, strict=True)):
            made = sum(len(image) for image in images) * self.args.tokens_per_tile
            if int(mask.sum()) != made:
                raise ValueError(f"row {row} has {int(mask.sum())} image tokens, its images make {made}")
