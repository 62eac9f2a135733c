"""The architecture of a model, validated at construction.

Field names are those of Meta's `llama-models` (`llama4/args.py`), so that its
`params.json` reads directly. Runtime choices (dtype, cache size, batch size)
do not belong here, with one exception: `max_batch_size` and `max_seq_len`
size the cache of plain, non-serving use, as they do in the reference.
"""

from pydantic import BaseModel, ConfigDict, Field, model_validator


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
    """Hidden width of SwiGLU; `None` derives it from the three fields below as Meta does."""
    multiple_of: int = Field(default=256, gt=0)
    ffn_dim_multiplier: float | None = Field(default=None, gt=0)
    ffn_exp: float = Field(default=4.0, gt=0)
    norm_eps: float = Field(default=1e-5, gt=0)
    tie_word_embeddings: bool = False

    rope_theta: float = Field(default=500000.0, gt=0)
    use_scaled_rope: bool = False
    rope_scaling_factor: float = Field(default=16.0, gt=0)
    rope_low_freq_factor: float = Field(default=1.0, gt=0)
    rope_high_freq_factor: float = Field(default=1.0, gt=0)
    rope_original_max_len: int = Field(default=8192, gt=0)

    max_batch_size: int = Field(default=32, gt=0)
    max_seq_len: int = Field(default=2048, gt=0)

    @model_validator(mode="after")
    def _fields_fit_together(self) -> "ModelArgs":
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_heads ({self.n_heads}) must be a multiple of n_kv_heads ({self.kv_heads})")
        if self.head_dim is None and self.dim % self.n_heads:
            raise ValueError(f"dim ({self.dim}) must be a multiple of n_heads ({self.n_heads}) unless head_dim is given")
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
        if self.ffn_hidden_dim is not None:
            return self.ffn_hidden_dim
        hidden = int(2 * int(self.ffn_exp * self.dim) / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return self.multiple_of * -(-hidden // self.multiple_of)
