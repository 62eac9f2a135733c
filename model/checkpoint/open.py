"""Finds out which format a location holds."""

from pathlib import Path

from model.checkpoint import gguf, huggingface, meta
from model.checkpoint.checkpoint import Checkpoint
from model.checkpoint.errors import CheckpointError
from model.checkpoint.hub import local_path


def open_checkpoint(location: str | Path) -> Checkpoint:
    """Opens a GGUF file, a Hugging Face or Meta folder, or `hf://org/name[@revision]`.

    Reads headers only; weights stay on disk, memory-mapped, until `Checkpoint.load_into`.
    Raises CheckpointError when there is nothing there, the format is not recognized, or it
    describes a model that cannot be served.
    """
    path = local_path(location)
    if path.is_file():
        if gguf.is_gguf(path):
            return gguf.open_gguf(path)
        raise CheckpointError(f"{path} is not a GGUF file; of the other formats, give the folder")
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist")
    return _open_folder(path)


def _open_folder(folder: Path) -> Checkpoint:
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return huggingface.open_huggingface(folder)
    if (folder / "params.json").is_file():
        return meta.open_meta(folder)
    files = sorted(folder.glob("*.gguf"))
    if len(files) == 1:
        return gguf.open_gguf(files[0])
    if files:
        raise CheckpointError(f"{folder} holds several GGUF files, give one: {', '.join(file.name for file in files)}")
    held = ", ".join(sorted(entry.name for entry in folder.iterdir())[:20])
    raise CheckpointError(
        f"{folder} holds no known checkpoint. Known are a .gguf file, config.json with *.safetensors, "
        f"params.json with consolidated.*.pth. It holds: {held or 'nothing'}"
    )
