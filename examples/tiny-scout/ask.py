"""Asks a running server about images: arguments that name files are images, all others are text.

.venv/bin/python examples/tiny-scout/ask.py examples/tiny-scout/pictures/*.png "What is their sum?"
"""

import argparse
import base64
import json
import mimetypes
from pathlib import Path
from urllib.request import Request, urlopen


def part(argument: str) -> dict[str, object]:
    """One part of an OpenAI message."""
    path = Path(argument)
    if not path.is_file():
        return {"type": "text", "text": argument}
    data = base64.b64encode(path.read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:{mimetypes.guess_type(path)[0]};base64,{data}"}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="+")
    parser.add_argument("--model", default="tiny-scout")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    options = parser.parse_args()
    messages = [{"role": "user", "content": [part(each) for each in options.part]}]
    body = json.dumps({"model": options.model, "messages": messages, "temperature": 0}).encode()
    request = Request(f"{options.url}/v1/chat/completions", body, {"Content-Type": "application/json"})
    with urlopen(request, timeout=60) as response:
        print(json.load(response)["choices"][0]["message"]["content"])
