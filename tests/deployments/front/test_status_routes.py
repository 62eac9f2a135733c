"""Models, health, version, metrics, and the tokenizer endpoints."""

import pytest
from prometheus_client.parser import text_string_to_metric_families


async def test_models(client):
    listed = (await client.get("/v1/models")).json()
    assert [model["id"] for model in listed["data"]] == ["tiny"]
    one = (await client.get("/v1/models/tiny")).json()
    assert one == listed["data"][0]
    assert one["max_model_len"] == 200


async def test_health_needs_every_engine(client, engine):
    assert (await client.get("/health")).json() == {"status": "ok", "models": ["tiny"]}
    engine.is_up = False
    response = await client.get("/health")
    assert response.status_code == 503
    assert "tiny: experts [3] of layer 1 did not answer" in response.json()["error"]["message"]


async def test_cluster(client):
    answer = (await client.get("/cluster")).json()
    assert answer["fronts"] == [{"replica_id": "f0", "pid": 1, "host": "127.0.0.1"}]
    assert answer["silent"] == {"engine-tiny": 1}


async def test_version(client):
    assert (await client.get("/version")).json() == {"version": "0.0.1"}


async def test_docs(client):
    assert (await client.get("/docs")).status_code == 200


async def test_tokens_there_and_back(client):
    answer = (await client.post("/tokenize", json={"model": "tiny", "prompt": "é!", "return_token_strs": True})).json()
    assert answer["tokens"] == list("é!".encode())
    assert answer["count"] == 3
    assert answer["max_model_len"] == 200
    assert answer["token_strs"][2] == "!"
    back = await client.post("/detokenize", json={"model": "tiny", "tokens": [*answer["tokens"], 256]})
    assert back.json() == {"prompt": "é!<eos>"}


async def test_tokens_of_a_conversation(client):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": False}
    answer = (await client.post("/tokenize", json=body)).json()
    assert bytes(answer["tokens"]) == b"<user>hi</>"


async def test_tokens_that_do_not_exist(client):
    response = await client.post("/detokenize", json={"model": "tiny", "tokens": [10**12]})
    assert response.status_code == 400


async def test_metrics_of_requests(client):
    for fields in ({}, {"max_tokens": 3, "n": 2, "stream": True}):
        await client.post("/v1/completions", json={"model": "tiny", "prompt": "abc", **fields})
    text = (await client.get("/metrics")).text
    samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels["model_name"] == "tiny"
            assert sample.labels["front"] == "front-0"
            samples[sample.name, sample.labels.get("finished_reason"), sample.labels.get("le")] = sample.value
    assert samples["vllm:request_success_total", "stop", None] == 1
    assert samples["vllm:request_success_total", "length", None] == 2
    assert samples["vllm:time_to_first_token_seconds_count", None, None] == 2
    assert samples["vllm:inter_token_latency_seconds_count", None, None] == 13 + 2 + 2
    assert samples["vllm:inter_token_latency_seconds_bucket", None, "+Inf"] == 17
    assert samples["vllm:e2e_request_latency_seconds_count", None, None] == 3
    assert samples["vllm:request_prompt_tokens_sum", None, None] == 6
    assert samples["vllm:request_generation_tokens_sum", None, None] == 14 + 3 + 3
    assert samples["vllm:request_params_n_sum", None, None] == 3


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/version"])
async def test_answers_match_the_document(client, path):
    document = (await client.get("/openapi.json")).json()
    schema = document["paths"][path]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    name = schema["$ref"].rsplit("/", 1)[1]
    required = document["components"]["schemas"][name].get("required", [])
    assert set(required) <= set((await client.get(path)).json())
