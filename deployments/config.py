"""What a Serve YAML's `args` may say. Unknown keys, wrong types and values out of range raise at deploy time."""

from typing import Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EngineConfig(_Config):
    """How an engine runs its model. Names follow vLLM's flags where it has one."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    max_model_len: int | None = Field(default=None, gt=0)
    """Longest prompt plus output in tokens; `None` takes the checkpoint's context length."""
    max_num_seqs: int = Field(default=128, gt=0)
    """Most sequences in one step."""
    max_num_batched_tokens: int = Field(default=1024, gt=0)
    """Token budget of one step: longer prompts are prefilled in chunks."""
    block_size: int = Field(default=16, gt=0)
    """Tokens in a KV block."""
    kv_cache_memory: ByteSize | None = None
    """Bytes for keys and values ("512MiB"); `None` takes `kv_cache_memory_share` of what is free."""
    kv_cache_memory_share: float = Field(default=0.25, gt=0, lt=1)
    enable_prefix_caching: bool = True
    max_waiting_requests: int = Field(default=512, ge=0)
    """Requests that may wait beyond those that run; one more is answered 429."""
    num_threads: int | None = Field(default=None, gt=0)
    """torch threads; `None` takes every CPU this process may use."""


class ModelConfig(_Config):
    """One served model."""

    id: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._\-]+$")
    """The `model` of requests; its engine deployment is called `engine-<id>`."""
    path: str
    """A GGUF file, a Hugging Face or Meta folder, or `hf://org/name`."""
    tokenizer: str | None = None
    """Where the tokenizer is, if not with the checkpoint."""
    chat_template: str | None = None
    """Path of a jinja2 template that replaces the checkpoint's."""
    engine: EngineConfig = EngineConfig()


class FrontConfig(_Config):
    """What the HTTP side allows."""

    api_keys: tuple[str, ...] = ()
    """Bearer tokens that may call the API; none means open."""
    max_body_size: ByteSize = ByteSize(16 * 2**20)
    """A larger request body is answered 413."""
    max_logprobs: int = Field(default=20, ge=0)
    max_choices: int = Field(default=128, gt=0)
    """Largest `n`."""


class AppConfig(_Config):
    """The whole application: `args` of the Serve YAML."""

    models: tuple[ModelConfig, ...] = Field(min_length=1)
    front: FrontConfig = FrontConfig()
