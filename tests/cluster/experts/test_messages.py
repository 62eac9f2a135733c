"""Whatever bytes come, they are a message or the end of the connection."""

import pytest

from cluster.experts.messages import Call, Refusal, decode_answer, decode_call
from cluster.streams import Disconnected


@pytest.mark.parametrize(
    ("decode", "message"),
    [(decode_call, Call(1, 2, "bfloat16", [3], [4])), (decode_answer, Refusal(1, "not_held", "expert 3"))],
)
def test_what_is_no_message_ends_the_connection(decode, message):
    header = message.encode()
    assert decode(header) == message
    for spoilt in (b"junk", header[:-1], *(header[:at] + b"\xff" + header[at + 1 :] for at in range(len(header)))):
        try:
            decode(spoilt)
        except Disconnected:
            continue


def test_invalid_utf8_too():
    spoilt = Refusal(1, "failed", "text").encode().replace(b"text", b"\xff\xfe\xfd\xfc")
    with pytest.raises(Disconnected, match="no answer"):
        decode_answer(spoilt)
