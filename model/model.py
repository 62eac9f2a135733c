"""The transformer: token ids in, logits out.

Two ways in, one set of layers. `forward` takes a rectangular batch: for training and plain
use. `step` takes a `PagedBatch` of many sequences at different places: for serving.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.layers import VocabParallelEmbedding
from fairscale.nn.model_parallel.mappings import gather_from_model_parallel_region
from torch import Tensor, nn

from model import load_hooks
from model.args import ModelArgs
from model.datatypes import PagedBatch, TransformerInput, TransformerOutput
from model.kv_cache import ContiguousCache, KeyValues, NoCache, PagedCache
from model.layers import (
    Attention,
    FeedForward,
    Positional,
    RMSNorm,
    RotaryEmbedding,
    attention_temperature,
    column_parallel,
)
from model.moe import Experts, MoE
from model.parallel import ensure_model_parallel, gather_columns, hand_over, split, stage
from model.vision.embedding import VisionEmbeddings
from model.vision.pixels import normalize_pixels

ExpertsOfLayer = Callable[[int], Experts]


class TransformerBlock(nn.Module):
    """Pre-norm: x + attention(norm(x)), then the same with the feed-forward, dense or of experts."""

    def __init__(self, args: ModelArgs, layer: int, experts: ExpertsOfLayer | None = None) -> None:
        super().__init__()
        self.attention: nn.Module = Attention(args, layer)
        self.feed_forward: nn.Module
        if args.is_moe_layer(layer):
            self.feed_forward = MoE(args, experts and experts(layer))
        else:
            self.feed_forward = FeedForward(args.dim, args.hidden_dim)
        self.attention_norm: nn.Module = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm: nn.Module = RMSNorm(args.dim, args.norm_eps)
        self.register_load_state_dict_pre_hook(load_hooks.drop_leftovers)
        self.register_load_state_dict_pre_hook(load_hooks.Rename(load_hooks.BLOCK_NAMES))

    def forward(self, x: Tensor, where: Positional, kv: KeyValues) -> Tensor:
        x = x + self.attention(self.attention_norm(x), where, kv)
        return x + self.feed_forward(self.ffn_norm(x))


class LLM(nn.Module):
    """A decoder-only transformer.

    Parameters are named as in Meta's checkpoints. `initialize=False` leaves them undefined, for
    a checkpoint to fill. With `experts` the model has no weights of routed experts: `experts(layer)` computes those
    of a layer, and only for inference.

    Of a pipeline this is one stage (stage.py): other stages' layers are placeholders without
    parameters, and so are the embedding, the last norm and the output anywhere but on the first.
    """

    def __init__(self, args: ModelArgs, *, initialize: bool = True, experts: ExpertsOfLayer | None = None) -> None:
        super().__init__()
        ensure_model_parallel()
        split(args.vocab_size, "vocab_size")
        self.args, self.stage = args, stage()
        mine = self.stage.layers(args.n_layers)
        self.layers = nn.ModuleList(
            TransformerBlock(args, layer, experts) if layer in mine else nn.Identity() for layer in range(args.n_layers)
        )
        self.tok_embeddings: nn.Module = nn.Identity()
        self.norm: nn.Module = nn.Identity()
        self.output: nn.Module | None = None
        if self.stage.is_first:
            self.tok_embeddings = VocabParallelEmbedding(args.vocab_size, args.dim, init_method=lambda w: w)
            self.norm = RMSNorm(args.dim, args.norm_eps)
            self.output = None if args.tie_word_embeddings else column_parallel(args.dim, args.vocab_size)
        self.rope = RotaryEmbedding(args)
        self.cache: ContiguousCache | None = None
        if args.vision_args is not None and self.stage.is_first:
            split(args.dim, "dim")
            self.vision_embeddings = VisionEmbeddings(args.vision_args)
            self.vision_projection = column_parallel(args.vision_args.output_dim, args.dim, gather=True)
        self.register_load_state_dict_pre_hook(load_hooks.drop_leftovers)
        if initialize:
            self.initialize_parameters()

    @torch.no_grad()
    def initialize_parameters(self) -> None:
        """Normal with deviation 0.02, and smaller where a block adds to the residual stream (GPT-2)."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                into_residual = name.endswith(("wo.weight", "w2.weight", "w2"))
                parameter.normal_(std=0.02 / (2 * self.args.n_layers) ** 0.5 if into_residual else 0.02)
        if self.args.vision_args is not None and self.stage.is_first:
            self.vision_embeddings.initialize_parameters()

    def forward(self, inputs: TransformerInput, inference: bool = False) -> TransformerOutput:
        """Logits [batch, length, vocab_size] of a rectangular batch.

        Without `inference` gradients flow and the batch is all there is to see. With it, keys and
        values of earlier calls are seen too: a row at position p continues what its cache holds.
        """
        if self.stage.count > 1:
            raise ValueError("one stage of a pipeline serves `step` only")
        positions = _positions(inputs)
        if int(positions.max()) >= self.args.max_seq_len:
            raise ValueError(f"position {int(positions.max())} is beyond max_seq_len ({self.args.max_seq_len})")
        if not inference:
            return TransformerOutput(self._logits(self._hidden(self._embedded(inputs), positions, NoCache())))
        with torch.no_grad():
            kv = self._contiguous_cache().at(positions)
            return TransformerOutput(self._logits(self._hidden(self._embedded(inputs), positions, kv)))

    @torch.inference_mode()
    def step(self, batch: PagedBatch, cache: PagedCache) -> Tensor:
        """Logits [num_rows, vocab_size] of the tokens that `batch.logit_rows` names; on rank 0, elsewhere a part."""
        x = self._embedded_rows(batch) if self.stage.is_first else self._rows(len(batch.tokens))
        x = self._through_stages(x, batch, cache.at(batch))
        return gather_columns(self._own_logits(self.norm(x))) if self.stage.is_first else x

    @torch.inference_mode()
    def embed_tiles(self, tiles: Tensor) -> Tensor:
        """Tiles as the front cuts them, to `PagedBatch.image_embeddings`.

        Give one image at a time: in company its embeddings may differ in their last bits.
        tiles: uint8 [num_tiles, 3, height, width] -> [num_tiles, tokens_per_tile, dim].
        """
        self._check_vision()
        pixels = normalize_pixels(tiles).to(next(self.parameters()).dtype)
        return self.vision_projection(self.vision_embeddings.embed(pixels))

    def blocks(self) -> Iterator[TransformerBlock]:
        """The layers of this stage, first to last."""
        for block in self.layers:
            if isinstance(block, TransformerBlock):
                yield block

    def _embedded_rows(self, batch: PagedBatch) -> Tensor:
        x = self.tok_embeddings(batch.tokens)
        if batch.image_rows is None or batch.image_embeddings is None:
            return x
        return x.index_copy(0, batch.image_rows, batch.image_embeddings.to(x.dtype))

    def _rows(self, count: int) -> Tensor:
        """Room for what another stage sends."""
        return next(self.parameters()).new_empty(count, self.args.dim)

    def _through_stages(self, x: Tensor, batch: PagedBatch, kv: KeyValues) -> Tensor:
        """The logit rows of x [num_tokens, dim] after all layers; what counts is the first stage's."""
        where = self._positional(batch.positions)
        count = self.stage.count
        for index in range(count):
            if index == self.stage.index:
                x = self._layers(x, where, kv)
            if index == count - 1:
                x = x[batch.logit_rows] if index == self.stage.index else self._rows(len(batch.logit_rows))
            if count > 1:
                hand_over(x, index, (index + 1) % count)
        return x

    def _embedded(self, inputs: TransformerInput) -> Tensor:
        """[batch, length, dim]: what the first layer sees of tokens and images."""
        x = self.tok_embeddings(inputs.tokens)
        if inputs.image_embedding is None:
            return x
        self._check_vision()
        image = self.vision_projection(inputs.image_embedding.embedding)
        return torch.where(inputs.image_embedding.mask, image, x)

    def _check_vision(self) -> None:
        if self.args.vision_args is None:
            raise ValueError("this model sees no images (vision_args is None)")

    def _positional(self, positions: Tensor) -> Positional:
        cosine, sine = self.rope(positions)
        return Positional(cosine, sine, attention_temperature(positions, self.args))

    def _layers(self, x: Tensor, where: Positional, kv: KeyValues) -> Tensor:
        for block in self.blocks():
            x = block(x, where, kv)
        return x

    def _hidden(self, x: Tensor, positions: Tensor, kv: KeyValues) -> Tensor:
        return self.norm(self._layers(x, self._positional(positions), kv))

    def _own_logits(self, hidden: Tensor) -> Tensor:
        """[..., vocab_size / ranks]: of this rank's part of the vocabulary."""
        if self.output is not None:
            return self.output(hidden)
        return F.linear(hidden, self.tok_embeddings.get_parameter("weight"))

    def _logits(self, hidden: Tensor) -> Tensor:
        return gather_from_model_parallel_region(self._own_logits(hidden))

    def _contiguous_cache(self) -> ContiguousCache:
        weight = self.tok_embeddings.get_parameter("weight")
        if self.cache is None or self.cache.keys.dtype != weight.dtype or self.cache.keys.device != weight.device:
            kv_heads = split(self.args.kv_heads, "n_kv_heads")
            self.cache = ContiguousCache(self.args, kv_heads, weight.dtype, weight.device)
        return self.cache


def _positions(inputs: TransformerInput) -> Tensor:
    """The position of every token: int64 [batch, length]."""
    batch, length = inputs.tokens.shape
    start = torch.as_tensor(inputs.tokens_position, device=inputs.tokens.device).reshape(-1, 1)
    return (start + torch.arange(length, device=inputs.tokens.device)).expand(batch, length)
