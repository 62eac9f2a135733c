"""The document says what the server does."""

import pytest


@pytest.fixture
async def document(client):
    return (await client.get("/openapi.json")).json()


def test_bodies_name_the_models_and_the_limits(document):
    schemas = document["components"]["schemas"]
    properties = schemas["CompletionRequest"]["properties"]
    assert properties["model"]["enum"] == ["tiny"]
    assert {"type": "integer", "minimum": 1, "maximum": 128} in properties["n"]["anyOf"]
    assert {"type": "null"} in properties["temperature"]["anyOf"]
    assert schemas["ChatRequest"]["additionalProperties"] is False
    assert "tools" not in schemas["ChatRequest"]["properties"]


def test_every_generating_endpoint_documents_its_errors(document):
    for path in ("/v1/chat/completions", "/v1/completions"):
        operation = document["paths"][path]["post"]
        assert set(operation["responses"]) >= {"200", "400", "401", "404", "413", "415", "429", "500", "503"}
        assert set(operation["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
        assert "requestBody" in operation


def test_every_reference_resolves(document):
    def references(node):
        if isinstance(node, dict):
            if "$ref" in node:
                yield node["$ref"]
            for value in node.values():
                yield from references(value)
        elif isinstance(node, list):
            for value in node:
                yield from references(value)

    known = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert set(references(document)) <= known
