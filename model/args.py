"""The architecture of a model, validated at construction.

Field names are those of Meta's `llama-models` (`llama4/args.py`), so that its
`params.json` reads directly. Runtime choices (dtype, cache size, batch size)
do not belong here, with one exception: `max_batch_size` and `max_seq_len`
size the cache of plain, non-serving use, as they do in the reference.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class MoEArgs(BaseModel):
    """Mixture of experts: which layers have it, how tokens are routed, how wide an expert is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_experts: int = Field(gt=0)
    top_k: int = Field(default=1, gt=0)
    """Experts a token goes to."""
    interleave_moe_layer_step: int = Field(default=1, gt=0)
    """Layers `step - 1`, `2 * step - 1`, … have experts; the others are dense."""
    capacity_factor: float = Field(default=1.0, gt=0)
    auto_scale_F: bool = True
    """Divide the hidden width by `capacity_factor + 1`: a token meets as many parameters as in a dense layer."""
    hidden_dim: int | None = Field(default=None, gt=0)
    """Hidden width of an expert; `None` derives it as Meta does."""
    router: Literal["sigmoid", "softmax"] = "sigmoid"
    """"sigmoid" (Llama 4) scales an expert's input by the sigmoid of its score; "softmax" (Mixtral) weighs
    the outputs of a token's experts by the softmax over their scores."""
    shared_expert: bool = True
    """Whether every token also meets one expert that all share."""

    @model_validator(mode="after")
    def _fields_fit_together(self) -> "MoEArgs":
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k ({self.top_k}) must not be above num_experts ({self.num_experts})")
        return self


class Size(BaseModel):
    """Of an image or a patch, in pixels."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    height: int = Field(gt=0)
    width: int = Field(gt=0)


class VisionArgs(BaseModel):
    """The image encoder, and how its output becomes embeddings of image tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image_size: Size
    """Of a tile, which is what the encoder sees at once."""
    patch_size: Size
    dim: int = Field(gt=0)
    n_layers: int = Field(gt=0)
    n_heads: int = Field(gt=0)
    mlp_ratio: float = Field(gt=0)
    """Hidden width of the encoder's feed-forward over `dim`."""
    output_dim: int = Field(gt=0)
    """Width of an image token's embedding, before `vision_projection` makes it the text model's."""
    pixel_shuffle_ratio: float = Field(gt=0, le=1)
    """1/n: squares of n by n patches become one image token."""

    @model_validator(mode="after")
    def _fields_fit_together(self) -> "VisionArgs":
        for side, size, patch in (
            ("height", self.image_size.height, self.patch_size.height),
            ("width", self.image_size.width, self.patch_size.width),
        ):
            if size % patch:
                raise ValueError(f"image_size.{side} ({size}) must be a multiple of patch_size.{side} ({patch})")
            if size // patch % self.shuffle:
                raise ValueError(
                    f"the {side} of {size // patch} patches must be a multiple of "
                    f"1 / pixel_shuffle_ratio ({self.shuffle})"
                )
        if abs(self.pixel_shuffle_ratio * self.shuffle - 1) > 1e-6:
            raise ValueError(f"pixel_shuffle_ratio ({self.pixel_shuffle_ratio}) must be 1 over a whole number")
        if self.dim % (4 * self.n_heads):
            raise ValueError(
                f"dim ({self.dim}) must be a multiple of 4 * n_heads ({4 * self.n_heads}): "
                "rotary embedding turns as many pairs by the row as by the column"
            )
        return self

    @property
    def shuffle(self) -> int:
        """Patches along each side of the square that becomes one image token."""
        return round(1 / self.pixel_shuffle_ratio)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches in a tile."""
        return self.image_size.height // self.patch_size.height, self.image_size.width // self.patch_size.width

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens that a tile becomes."""
        rows, columns = self.grid
        return rows * columns // self.shuffle**2

    @property
    def hidden_dim(self) -> int:
        """Hidden width of the encoder's feed-forward."""
        return int(self.mlp_ratio * self.dim)


class ModelArgs(BaseModel):
    """Shape and constants of a decoder-only transformer.

    Raises `pydantic.ValidationError` naming the field and its value when one is
    out of range, or when the fields do not fit together.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dim: int = Field(gt=0)
    n_layers: int = Field(gt=0)
    n_heads: int = Field(gt=0)
    n_kv_heads: int | None = Field(default=None, gt=0)
    """Key/value heads; `None` means one for each query head (MHA)."""
    head_dim: int | None = Field(default=None, gt=0)
    """Width of a head; `None` means `dim // n_heads`."""
    vocab_size: int = Field(gt=0)
    ffn_hidden_dim: int | None = Field(default=None, gt=0)
    """Hidden width of dense SwiGLU layers; `None` derives it from the fields below as Meta does."""
    multiple_of: int = Field(default=256, gt=0)
    ffn_dim_multiplier: float | None = Field(default=None, gt=0)
    ffn_exp: float = Field(default=4.0, gt=0)
    """Hidden width of experts over `dim`, before Meta's rule scales it."""
    norm_eps: float = Field(default=1e-5, gt=0)
    tie_word_embeddings: bool = False

    rope_theta: float = Field(default=500000.0, gt=0)
    use_scaled_rope: bool = False
    rope_scaling_factor: float = Field(default=16.0, gt=0)
    rope_low_freq_factor: float = Field(default=1.0, gt=0)
    rope_high_freq_factor: float = Field(default=1.0, gt=0)
    rope_original_max_len: int = Field(default=8192, gt=0)

    attention_chunk_size: int | None = Field(default=None, gt=0)
    """Layers with rotary embedding see only their own chunk of this many positions."""
    nope_layer_interval: int | None = Field(default=None, gt=0)
    """Every n-th layer has no position embedding and sees the whole context."""
    use_qk_norm: bool = False
    """Normalize queries and keys, without a weight, in layers with rotary embedding."""
    attn_temperature_tuning: bool = False
    """Scale queries of NoPE layers with the logarithm of their position (https://arxiv.org/abs/2501.19399)."""
    floor_scale: float = Field(default=8192.0, gt=0)
    attn_scale: float = Field(default=0.1, ge=0)

    moe_args: MoEArgs | None = None
    vision_args: VisionArgs | None = None

    max_batch_size: int = Field(default=32, gt=0)
    max_seq_len: int = Field(default=2048, gt=0)

    @model_validator(mode="after")
    def _fields_fit_together(self) -> "ModelArgs":
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_heads ({self.n_heads}) must be a multiple of n_kv_heads ({self.kv_heads})")
        if self.head_dim is None and self.dim % self.n_heads:
            raise ValueError(
                f"dim ({self.dim}) must be a multiple of n_heads ({self.n_heads}) unless head_dim is given"
            )
        if self.width_of_head % 2:
            raise ValueError(f"head_dim ({self.width_of_head}) must be even: rotary embedding turns pairs")
        if self.use_scaled_rope and self.rope_high_freq_factor < self.rope_low_freq_factor:
            raise ValueError(
                f"rope_high_freq_factor ({self.rope_high_freq_factor}) must not be below "
                f"rope_low_freq_factor ({self.rope_low_freq_factor})"
            )
        return self

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def width_of_head(self) -> int:
        return self.head_dim or self.dim // self.n_heads

    @property
    def hidden_dim(self) -> int:
        """Hidden width of the dense SwiGLU layers (Meta's rule where it is not given)."""
        return self.ffn_hidden_dim or self._rounded(int(2 * 4 * self.dim / 3))

    @property
    def expert_hidden_dim(self) -> int:
        """Hidden width of an expert (Meta's rule where it is not given)."""
        if self.moe_args is None:
            raise ValueError("this model has no experts (moe_args is None)")
        if self.moe_args.hidden_dim is not None:
            return self.moe_args.hidden_dim
        shrink = self.moe_args.capacity_factor + 1 if self.moe_args.auto_scale_F else 1.0
        return self._rounded(int(2 * int(self.ffn_exp * self.dim) / 3), shrink)

    def _rounded(self, hidden: int, shrink: float = 1.0) -> int:
        hidden = int((self.ffn_dim_multiplier or 1.0) * hidden)
        return self.multiple_of * -(-int(hidden / shrink) // self.multiple_of)

    def is_nope_layer(self, layer: int) -> bool:
        """Whether `layer` (from 0) has no position embedding."""
        return self.nope_layer_interval is not None and (layer + 1) % self.nope_layer_interval == 0

    def is_moe_layer(self, layer: int) -> bool:
        """Whether `layer` (from 0) has experts."""
        return self.moe_args is not None and (layer + 1) % self.moe_args.interleave_moe_layer_step == 0
