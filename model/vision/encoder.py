"""The image encoder of Llama 4: a vision transformer that sees one tile at a time.

Owns the way from pixels of a tile to features of its patches. It does not know which tiles make
an image, nor the text model. Parameters are named as in Meta's checkpoints.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.args import VisionArgs
from model.layers import Positional, column_parallel, rotate, row_parallel
from model.parallel import split

ROPE_THETA = 10000.0


class PatchEmbedding(nn.Module):
    """A convolution whose stride is its kernel: every patch is flattened, then projected."""

    def __init__(self, args: VisionArgs) -> None:
        super().__init__()
        size = (args.patch_size.height, args.patch_size.width)
        self._unfold = nn.Unfold(kernel_size=size, stride=size)
        self._linear = column_parallel(3 * size[0] * size[1], args.dim, gather=True)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: [tiles, 3, height, width] -> [tiles, patches, dim], patches row by row."""
        return self._linear(self._unfold(pixels).transpose(1, 2))


class RotaryEmbedding2d(nn.Module):
    """Rotary embedding by place in the tile: the first half of the pairs turn by the column, the others by the row.

    Columns and rows count from 1. The class token, which comes last, is not turned.
    """

    cosine: Tensor
    sine: Tensor

    def __init__(self, args: VisionArgs) -> None:
        super().__init__()
        self.args = args
        self._fill_tables(torch.device("cpu"))

    def _fill_tables(self, device: torch.device) -> None:
        rows, columns = self.args.grid
        half = self.args.dim // self.args.n_heads // 2
        freqs = 1.0 / ROPE_THETA ** (torch.arange(0, half, 2, dtype=torch.float32, device=device) / half)
        patches = torch.arange(rows * columns, device=device)
        column, row = patches % columns + 1, patches // columns + 1
        angles = torch.cat([torch.outer(column, freqs), torch.outer(row, freqs)], dim=1)
        angles = F.pad(angles, (0, 0, 0, 1))
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryEmbedding2d":
        """Follows the model to a device, but stays float32 when it is cast."""
        super()._apply(fn, recurse)
        self._fill_tables(self.get_buffer("cosine").device)
        return self

    def forward(self) -> Positional:
        """Cosines and sines, float32 [patches + 1, head_dim / 2] each."""
        return Positional(self.cosine, self.sine, None)


class VisionAttention(nn.Module):
    """Every token of a tile sees every other; heads are split over tensor-parallel ranks."""

    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        split(n_heads, "vision n_heads")
        self.head_dim = dim // n_heads
        self.wq = column_parallel(dim, dim, bias=True)
        self.wk = column_parallel(dim, dim, bias=True)
        self.wv = column_parallel(dim, dim, bias=True)
        self.wo = row_parallel(dim, dim, bias=True)

    def forward(self, x: Tensor, where: Positional) -> Tensor:
        """x: [tiles, tokens, dim] -> like x."""
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k, v = rotate(q, where).transpose(1, 2), rotate(k, where).transpose(1, 2), v.transpose(1, 2)
        return self.wo(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class GELUFeedForward(nn.Module):
    """Two layers around a GELU; the hidden width is split over tensor-parallel ranks."""

    def __init__(self, dim_in: int, hidden_dim: int, dim_out: int, *, bias: bool) -> None:
        super().__init__()
        split(hidden_dim, "vision hidden_dim")
        self.c_fc = column_parallel(dim_in, hidden_dim, bias=bias)
        self.c_proj = row_parallel(hidden_dim, dim_out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., dim_in] -> [..., dim_out]."""
        return self.c_proj(F.gelu(self.c_fc(x)))


class VisionBlock(nn.Module):
    """Pre-norm: x + attention(norm(x)), then the same with the feed-forward."""

    def __init__(self, args: VisionArgs) -> None:
        super().__init__()
        self.attn = VisionAttention(args.dim, args.n_heads)
        self.ln_1 = nn.LayerNorm(args.dim)
        self.mlp = GELUFeedForward(args.dim, args.hidden_dim, args.dim, bias=True)
        self.ln_2 = nn.LayerNorm(args.dim)

    def forward(self, x: Tensor, where: Positional) -> Tensor:
        """x: [tiles, tokens, dim] -> like x."""
        x = x + self.attn(self.ln_1(x), where)
        return x + self.mlp(self.ln_2(x))


class VisionTransformer(nn.Module):
    """The blocks, first to last."""

    def __init__(self, args: VisionArgs) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(VisionBlock(args) for _ in range(args.n_layers))

    def forward(self, x: Tensor, where: Positional) -> Tensor:
        """x: [tiles, tokens, dim] -> like x."""
        for block in self.resblocks:
            x = block(x, where)
        return x


class VisionEncoder(nn.Module):
    """Features of the patches of every tile."""

    def __init__(self, args: VisionArgs) -> None:
        super().__init__()
        self.args = args
        rows, columns = args.grid
        self.conv1 = PatchEmbedding(args)
        self.class_embedding = nn.Parameter(torch.zeros(args.dim))
        self.positional_embedding_vlm = nn.Parameter(torch.empty(rows * columns + 1, args.dim))
        self.ln_pre = nn.LayerNorm(args.dim)
        self.ln_post = nn.LayerNorm(args.dim)
        self.transformer = VisionTransformer(args)
        self.rope = RotaryEmbedding2d(args)
        self.register_load_state_dict_pre_hook(_resample_positions)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: [tiles, 3, height, width], -1 to 1 -> [tiles, patches, dim], patches row by row."""
        size = self.args.image_size
        if pixels.dim() != 4 or pixels.shape[1:] != (3, size.height, size.width):
            raise ValueError(f"tiles must be [tiles, 3, {size.height}, {size.width}], got {list(pixels.shape)}")
        x = self.conv1(pixels)
        x = torch.cat([x, self.class_embedding.expand(len(x), 1, -1)], dim=1) + self.positional_embedding_vlm
        x = self.ln_post(self.transformer(self.ln_pre(x), self.rope()))
        return x[:, :-1]  # without the class token


def _resample_positions(encoder: VisionEncoder, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """`positional_embedding`, of a checkpoint from before it met a text model, to `positional_embedding_vlm`.

    Its first row is the class token's. Meta samples the others half a patch up and left of where
    they were, zeros around the tile: the mean of four neighbours.
    """
    old = state.pop(prefix + "positional_embedding", None)
    if old is None:
        return
    expected = encoder.positional_embedding_vlm.shape
    if old.shape != expected:
        raise ValueError(f"{prefix}positional_embedding must be {list(expected)}, got {list(old.shape)}")
    by_place = old[1:].T.unflatten(1, encoder.args.grid)
    means = F.avg_pool2d(F.pad(by_place, (1, 0, 1, 0)), kernel_size=2, stride=1)
    state[prefix + "positional_embedding_vlm"] = torch.cat([means.flatten(1).T, old[:1]])
