"""What a Serve YAML's `args` may say. Unknown keys, wrong types and values out of range raise at deploy time."""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, model_validator

ROOT = Path(__file__).parents[1]
"""The repository, when the package is installed from one in editable form."""


class ConfigError(ValueError):
    """What is wrong with a configuration, one fault a line, each with the key it is about."""


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _keys_are_known(cls, values: Any) -> Any:
        for key in values if isinstance(values, dict) else ():
            if key not in cls.model_fields:
                near = difflib.get_close_matches(str(key), cls.model_fields, n=1)
                raise ValueError(f"unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        return values


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
    """Bytes for keys and values of all ranks ("512MiB"); `None` takes `kv_cache_memory_share` of what is free."""
    kv_cache_memory_share: float = Field(default=0.25, gt=0, lt=1)
    enable_prefix_caching: bool = True
    image_cache_memory: ByteSize = ByteSize(256 * 2**20)
    """Bytes for the embeddings of images used last, so that a conversation does not encode one twice."""
    max_waiting_requests: int = Field(default=512, ge=0)
    """Requests that may wait beyond those that run; one more is answered 429."""
    num_threads: int | None = Field(default=None, gt=0)
    """torch threads of a rank; `None` takes its share of the CPUs of its host."""
    tensor_parallel_size: int = Field(default=1, gt=0)
    """Ranks that share each layer; must divide heads, KV heads, hidden width and vocabulary."""
    pipeline_parallel_size: int = Field(default=1, gt=0)
    """Stages that the layers are cut into, of `tensor_parallel_size` ranks each. One batch is in flight at a time."""
    bundle_per_rank: dict[str, Annotated[float, Field(gt=0)]] = {"CPU": 1.0}
    """Ray resources of each rank, when there are several; one bundle of the replica's placement group."""
    rank_timeout_s: float = Field(default=10.0, gt=0)
    """A rank that gives no sign of life for so long is taken for dead, and its replica is replaced. Between hosts one
    that computes gives none: there it must be more than the longest step takes, waits for experts included."""
    wait_for_nodes: bool = False
    """Deploy even though no node has room for a rank now: an autoscaler will bring one."""

    @model_validator(mode="after")
    def _keys_have_an_effect(self) -> "EngineConfig":
        remedies = {
            "bundle_per_rank": "set ray_actor_options of the engine's deployment",
            "rank_timeout_s": "front.heartbeat_timeout_s says when an engine is taken for frozen",
            "wait_for_nodes": "Ray places one rank as soon as there is room",
        }
        for key, remedy in remedies.items():
            if key in self.model_fields_set and not self.bundles:
                raise ValueError(
                    f"{key} has no effect on one rank (tensor_parallel_size and pipeline_parallel_size are 1); "
                    f"remove it: {remedy}"
                )
        return self

    @property
    def bundles(self) -> list[dict[str, float]]:
        """One for each rank; none for a single rank, which is placed as its replica is."""
        size = self.tensor_parallel_size * self.pipeline_parallel_size
        return [dict(self.bundle_per_rank)] * size if size > 1 else []


class ExpertsConfig(_Config):
    """Experts on servers of their own: each replica of the deployment `experts-<id>` is one."""

    copies: int = Field(default=2, gt=0)
    """Servers that hold an expert, at least, while there are as many."""
    memory: ByteSize | None = None
    """Bytes for experts on each server; `None` means room for `copies` of everything and an eighth more."""
    num_threads: int = Field(default=1, gt=0)
    """torch threads of a server."""
    deadline_s: float = Field(default=0.1, gt=0)
    """After which another copy is asked as well, beyond four times what the rows usually take."""
    give_up_s: float = Field(default=60.0, gt=0)
    """How long a step waits while no copy of an expert answers, before its requests fail."""
    ready_timeout_s: float = Field(default=900.0, gt=0)
    """How long a starting engine waits for every expert to be on a server."""


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
    max_image_tiles: int = Field(default=16, gt=0)
    """Most tiles that an image is cut into, the one that shows all of it not counted; as the model was trained."""
    engine: EngineConfig = EngineConfig()
    experts: ExpertsConfig | None = None
    """For a mixture of experts: put them on servers of their own; `None` keeps them in the engine."""


class ImageConfig(_Config):
    """Which images of requests are read, for models that see."""

    max_per_request: int = Field(default=10, gt=0)
    max_bytes: ByteSize = ByteSize(20 * 2**20)
    """Of one encoded image; `data:` URLs are part of the body, and so within its size too."""
    max_pixels: int = Field(default=50_000_000, gt=0)
    """Of one image, width times height, before it is resized."""
    allowed_hosts: tuple[str, ...] = ()
    """Hosts that `http(s)` URLs may name: "example.com", "*.example.com", "*" for any. None: `data:` URLs only.
    Private addresses are never fetched from."""
    fetch_timeout_s: float = Field(default=10.0, gt=0)


class FrontConfig(_Config):
    """What the HTTP side allows."""

    api_keys: tuple[str, ...] = ()
    """Bearer tokens that may call the API; none means open."""
    max_body_size: ByteSize = ByteSize(16 * 2**20)
    """A larger request body is answered 413."""
    max_logprobs: int = Field(default=20, ge=0)
    max_choices: int = Field(default=128, gt=0)
    """Largest `n`."""
    images: ImageConfig = ImageConfig()
    heartbeat_timeout_s: float = Field(default=3.0, ge=1)
    """An engine that is silent for longer, while it has requests, is taken for frozen: they go on at another."""
    failover_timeout_s: float = Field(default=60.0, ge=0)
    """How long a request that has no engine, or has lost it, waits for one that takes it."""


class AppConfig(_Config):
    """The whole application: `args` of the Serve YAML."""

    models: tuple[ModelConfig, ...] = Field(min_length=1)
    front: FrontConfig = FrontConfig()

    @model_validator(mode="after")
    def _ids_differ(self) -> "AppConfig":
        ids = [model.id for model in self.models]
        if len(set(ids)) < len(ids):
            raise ValueError(f"two models have the same id: {', '.join(ids)}")
        return self


def read(args: dict[str, Any]) -> AppConfig:
    """`args` checked, its paths absolute. Raises ConfigError."""
    config = parse(args)
    return config.model_copy(update={"models": tuple(_with_absolute_paths(model) for model in config.models)})


def parse(args: dict[str, Any]) -> AppConfig:
    """`args` checked, but not whether what its paths name is on this machine. Raises ConfigError."""
    try:
        return AppConfig.model_validate(args)
    except ValidationError as error:
        raise ConfigError("\n".join(_fault(fault) for fault in error.errors())) from None


def _fault(fault: Any) -> str:
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in ("args", *fault["loc"]))
    message = fault["msg"].removeprefix("Value error, ")
    value = "" if isinstance(fault["input"], dict | list | tuple) else f" (is {fault['input']!r})"
    return f"{place[1:]}: {message}{value}"


def _with_absolute_paths(model: ModelConfig) -> ModelConfig:
    named = {key: getattr(model, key) for key in ("path", "tokenizer", "chat_template")}
    found = {key: _absolute(f"{key} of model {model.id!r}", value) for key, value in named.items() if value}
    return model.model_copy(update=found)


def _absolute(what: str, location: str) -> str:
    """A relative path may start at the working directory or at the repository."""
    if "://" in location:
        return location
    candidates = [(start / Path(location).expanduser()).resolve() for start in (Path.cwd(), ROOT)]
    for candidate in candidates:
        if candidate.exists():
            return str(candidate)
    raise ConfigError(f"{what}: there is no {' or '.join(dict.fromkeys(map(str, candidates)))}")
