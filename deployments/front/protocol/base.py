"""How every request model behaves: strict types, null means default, nothing unknown passes."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError


class RequestModel(BaseModel):
    """A JSON object of a request.

    A field that is neither declared nor in `refused` is an error. One in `refused` is an error unless its value is
    among those listed there, which ask for nothing: they are what clients send by default.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Fields of OpenAI's or vLLM's API that this server does not support -> values that mean "off"."""

    @model_validator(mode="before")
    @classmethod
    def _null_means_default(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name in data.keys() & cls.refused.keys():
            value = data[name]
            if value is not None and not any(_same(value, off) for off in cls.refused[name]):
                raise PydanticCustomError("unsupported", "{name} is not supported by this server", {"name": name})
        return {
            name: value
            for name, value in data.items()
            if name not in cls.refused and not (value is None and name in cls.model_fields)
        }

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Says in the schema that null stands for the default."""
        schema = handler.resolve_ref_schema(handler(core_schema))
        for name, field in schema.get("properties", {}).items():
            if name not in schema.get("required", ()):
                schema["properties"][name] = _nullable(field)
        return schema


def _same(value: Any, off: Any) -> bool:
    """Equality that tells False from 0."""
    return value == off and isinstance(value, bool) == isinstance(off, bool)


def _nullable(field: JsonSchemaValue) -> JsonSchemaValue:
    outer: JsonSchemaValue = {key: field.pop(key) for key in ("title", "description", "default") if key in field}
    null = {"type": "null"}
    branches = field["anyOf"] if set(field) == {"anyOf"} else [field]
    return {"anyOf": branches if null in branches else [*branches, null], **outer}
