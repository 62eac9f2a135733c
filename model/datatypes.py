"""What goes into the transformer and what comes out."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class MaskedEmbedding:
    """Embeddings of images at the places of their tokens, as `VisionEmbeddings` makes them.

    embedding: [batch, length, vision output_dim]; what it holds elsewhere does not matter.
    mask: bool [batch, length, 1], True at image tokens.
    """

    embedding: Tensor
    mask: Tensor


@dataclass(frozen=True)
class TransformerInput:
    """Plain use: a rectangular batch of token ids.

    tokens: int64 [batch, length].
    tokens_position: position of the first token: one int for all rows, or int64 [batch].
    image_embedding: takes the place of the token embeddings where its mask is True.
    """

    tokens: Tensor
    tokens_position: int | Tensor = 0
    image_embedding: MaskedEmbedding | None = None


@dataclass(frozen=True)
class TransformerOutput:
    """logits: [batch, length, vocab_size], float32 when computed without gradients' need of the model dtype."""

    logits: Tensor


@dataclass(frozen=True)
class PagedBatch:
    """Serving: the tokens of many sequences in one flat row, their keys and values in blocks.

    Sequence `s` owns tokens `query_starts[s] : query_starts[s + 1]`, which are its last
    tokens so far. Decoding sequences (one token) come first, `num_decodes` of them; those
    with more tokens (prefill chunks) follow.

    tokens, positions: int64 [num_tokens].
    query_starts: int32 [num_sequences + 1].
    context_lens: int32 [num_sequences], tokens with a key after this step, this step's included.
    block_tables: int32 [num_groups, num_sequences, max_blocks], a table for each of the model's KV groups
      (model/kv_groups.py). Entries after the end, and of blocks that chunked layers no longer see, are never followed.
    logit_rows: int64 [num_rows], which tokens need logits.
    image_rows: int64 [num_image_tokens], which tokens are of images; None when none is.
    image_embeddings: [num_image_tokens, dim], what stands in their place: rows of `LLM.embed_tiles`.
    """

    tokens: Tensor
    positions: Tensor
    query_starts: Tensor
    context_lens: Tensor
    block_tables: Tensor
    logit_rows: Tensor
    num_decodes: int
    image_rows: Tensor | None = None
    image_embeddings: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.image_rows is None) != (self.image_embeddings is None):
            raise ValueError("image_rows and image_embeddings go together")
