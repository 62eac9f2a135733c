"""The serving form of a bfloat16 model on a CPU: the same tree of modules, some swapped for packed ones.

`pack` replaces attention, feed-forward, norms and the output projection of an `LLM`, in place,
by modules that call the kernels of `model.kernels.cpu`. The originals stay the readable
definition and the oracle; a packed model serves `LLM.step` and nothing else.
"""

import torch
from fairscale.nn.model_parallel.mappings import reduce_from_model_parallel_region
from torch import Tensor, nn

from model.args import ModelArgs
from model.datatypes import PagedBatch
from model.kernels import cpu
from model.kv_cache import PagedCache
from model.layers import Attention, FeedForward, RMSNorm
from model.model import LLM
from model.parallel import model_parallel_size


def can_pack(args: ModelArgs, dtype: torch.dtype, block_size: int) -> bool:
    """Whether the kernels are there and take this model's shapes."""
    widths = (args.width_of_head, args.dim, args.hidden_dim // model_parallel_size())
    fits = all(width % cpu.LANES == 0 for width in widths) and args.width_of_head <= cpu.MAX_HEAD_DIM
    return dtype is torch.bfloat16 and block_size % cpu.LANES == 0 and fits and cpu.available()


@torch.no_grad()
def pack(model: LLM) -> LLM:
    """Swaps the modules of `model` for packed ones and frees the weights they came from."""
    output = model.tok_embeddings if model.output is None else model.output
    model.output = PackedOutput(output.weight)
    for block in model.layers:
        block.attention = PackedAttention(block.attention)
        block.feed_forward = PackedFeedForward(block.feed_forward)
        block.attention_norm = PackedRMSNorm(block.attention_norm)
        block.ffn_norm = PackedRMSNorm(block.ffn_norm)
    model.norm = PackedRMSNorm(model.norm)
    return model


class PackedCache(PagedCache):
    """A `PagedCache` whose blocks lie in tiles as the kernels read them."""

    def at(self, batch: PagedBatch) -> "PackedStep":
        return PackedStep(self, batch)


class PackedStep:
    """One step over a `PackedCache`; `PackedAttention` reads it directly."""

    def __init__(self, cache: PackedCache, batch: PagedBatch) -> None:
        self.keys, self.values = cache.keys.unbind(0), cache.values.unbind(0)
        self.batch, self.block_size = batch, cache.block_size

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise TypeError("a PackedCache serves packed models only: call model.packed.pack(model)")


class PackedAttention(nn.Module):
    """`Attention` as two matrix products around one kernel that rotates, caches and attends."""

    def __init__(self, plain: Attention) -> None:
        super().__init__()
        self.layer, self.heads, self.kv_heads, self.head_dim = plain.layer, plain.heads, plain.kv_heads, plain.head_dim
        self.wqkv = cpu.PackedLinear(torch.cat([plain.wq.weight, plain.wk.weight, plain.wv.weight]))
        self.wo = cpu.PackedLinear(plain.wo.weight)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], kv: PackedStep) -> Tensor:
        out = cpu.paged_attention(
            self.wqkv(x), rope, kv.keys[self.layer], kv.values[self.layer], kv.batch,
            self.heads, self.kv_heads, self.head_dim, kv.block_size,
        )  # fmt: skip
        return reduce_from_model_parallel_region(self.wo(out))


class PackedFeedForward(nn.Module):
    """`FeedForward` with gate and up in one product that ends in SwiGLU."""

    def __init__(self, plain: FeedForward) -> None:
        super().__init__()
        self.w13 = cpu.PackedSwiGLU(plain.w1.weight, plain.w3.weight)
        self.w2 = cpu.PackedLinear(plain.w2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return reduce_from_model_parallel_region(self.w2(self.w13(x)))


class PackedRMSNorm(nn.Module):
    """`RMSNorm` in one kernel."""

    def __init__(self, plain: RMSNorm) -> None:
        super().__init__()
        self.eps, self.weight = plain.eps, plain.weight

    def forward(self, x: Tensor) -> Tensor:
        return cpu.rms_norm(x, self.weight, self.eps)


class PackedOutput(nn.Module):
    """The output projection; its logits are float32, never rounded to bfloat16."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.projection = cpu.PackedLinear(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(x, torch.float32)
