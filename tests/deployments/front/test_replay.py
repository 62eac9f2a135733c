"""What is kept of a request, and when it is given up."""

import pytest

from deployments.engine.request import TokenDelta, TokenLogprobs
from deployments.front.engine_client import EngineFailure
from deployments.front.replay import MAX_FRUITLESS, EngineLeft, EngineLost, Losses, Transcript


def delta(offset: int, tokens: list[int], finish: str | None = None, index: int = 0) -> TokenDelta:
    logprobs = [TokenLogprobs(token, -1.0, 1, []) for token in tokens]
    return TokenDelta("r", index, offset, tokens, logprobs, finish)


def test_deltas_in_order_pass_unchanged():
    transcript = Transcript(1)
    for news in (delta(0, [5]), delta(1, [6, 7]), delta(3, [8], "length")):
        assert transcript.take(news) is news
    assert transcript.is_finished
    assert transcript.outputs == (None,)


def test_tokens_that_are_known_are_not_passed_on_again():
    transcript = Transcript(1)
    transcript.take(delta(0, [5, 6]))
    assert transcript.take(delta(0, [5])) is None
    news = transcript.take(delta(1, [6, 7]))
    assert (news.offset, news.token_ids, [row.token_id for row in news.logprobs]) == (2, [7], [7])
    assert transcript.outputs == ((5, 6, 7),)


def test_a_hole_is_a_lost_engine():
    transcript = Transcript(1)
    transcript.take(delta(0, [5]))
    with pytest.raises(EngineLost, match="2 tokens were lost"):
        transcript.take(delta(3, [8]))


def test_choices_are_apart_and_finished_ones_are_not_run_again():
    transcript = Transcript(3)
    transcript.take(delta(0, [5], "stop", index=1))
    transcript.take(delta(0, [6], index=2))
    assert transcript.take(delta(0, [5], "stop", index=1)) is None
    assert transcript.outputs == ((), None, (6,))
    assert (transcript.num_tokens, transcript.is_finished) == (2, False)


def test_a_request_that_engines_die_of_is_given_up_unless_tokens_come():
    losses = Losses()
    for number in range(10):
        losses.add(EngineLost("Engine replica a died"), number + 1)
    for _ in range(MAX_FRUITLESS - 2):
        losses.add(EngineLost("Engine replica b died"), 10)
    with pytest.raises(EngineFailure, match=r"a died; .*b died; .*c died\. 10 tokens had come, none from 4 engines"):
        losses.add(EngineLost("Engine replica c died"), 10)


def test_engines_that_leave_are_not_held_against_a_request():
    losses = Losses()
    for _ in range(3 * MAX_FRUITLESS):
        losses.add(EngineLeft("Engine replica a is stopping"), 0)
    assert len(losses.causes) == MAX_FRUITLESS
    for _ in range(MAX_FRUITLESS - 1):
        losses.add(EngineLost("Engine replica b died"), 0)
    with pytest.raises(EngineFailure, match="none from 4 engines"):
        losses.add(EngineLost("Engine replica b died"), 0)


def test_losses_tell_what_happened():
    losses = Losses()
    assert str(losses) == "No engine takes requests. 0 tokens had come"
    losses.add(EngineLost("Engine replica a died"), 3)
    assert str(losses) == "Engine replica a died. 3 tokens had come"
