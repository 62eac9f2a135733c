"""Long texts do not keep other streams waiting."""

import asyncio
import time

from deployments.front.prompt import LONG_CHARACTERS, from_text


async def test_a_long_text_is_encoded_beside_the_event_loop(served, monkeypatch):
    encode = served.tokenizer.encode

    def slow(text, **options):
        time.sleep(0.3)
        return encode(text, **options)

    monkeypatch.setattr(served.tokenizer, "encode", slow)
    encoding = asyncio.ensure_future(from_text(served, "a" * (LONG_CHARACTERS + 1), True))
    turns = 0
    while not encoding.done():
        await asyncio.sleep(0.01)
        turns += 1
    assert turns > 5
    assert len(encoding.result().token_ids) == LONG_CHARACTERS + 1
