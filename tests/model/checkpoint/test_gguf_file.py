import gguf
import numpy as np
import pytest

from model.checkpoint import CheckpointError
from model.checkpoint.gguf_file import read_gguf


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.name", "Türkçe ✓")
    writer.add_array("tokenizer.ggml.tokens", ["", "a", "ğ", "<s>"])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.25])
    writer.add_array("some.flags", [True, False])
    writer.add_bool("some.flag", True)
    writer.add_float64("some.double", 1e-300)
    writer.add_int64("some.negative", -(1 << 40))
    writer.add_uint8("some.small", 200)
    rng = np.random.default_rng(0)
    writer.add_tensor("a", rng.normal(size=(3, 5)).astype(np.float32))
    writer.add_tensor("b", rng.normal(size=(2, 3, 7)).astype(np.float16))
    quantized = gguf.quantize(rng.normal(size=(4, 64)).astype(np.float32), gguf.GGMLQuantizationType.Q4_1)
    writer.add_tensor("c", quantized, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _assert_as_the_library_reads(path):
    file, reader = read_gguf(path), gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert file.metadata == fields
    assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
    for expected in reader.tensors:
        tensor = file.tensors[expected.name]
        assert tensor.type == expected.tensor_type
        assert tensor.shape == tuple(reversed(expected.shape.tolist()))
        assert tensor.data.tobytes() == expected.data.tobytes()


def test_settings_and_tensors_are_what_the_library_reads(path):
    _assert_as_the_library_reads(path)


def test_a_real_file_is_what_the_library_reads(smollm2):
    _assert_as_the_library_reads(smollm2)


def test_every_shorter_file_is_refused(path, tmp_path):
    content = path.read_bytes()
    for size in [*range(0, len(content), 97), len(content) - 1]:
        short = tmp_path / "short.gguf"
        short.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match="short"):
            read_gguf(short)


def test_a_file_without_its_last_tensor_asks_for_another_download(path):
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"cut short: c ends at byte \d+ of \d+; download it again"):
        read_gguf(path)


def test_another_magic_or_version_is_refused(path):
    content = path.read_bytes()
    path.write_bytes(b"GGML" + content[4:])
    with pytest.raises(CheckpointError, match="starts with b'GGML'"):
        read_gguf(path)
    path.write_bytes(content[:4] + (1).to_bytes(4, "little") + content[8:])
    with pytest.raises(CheckpointError, match="version 1"):
        read_gguf(path)


def test_every_kind_of_setting_is_what_the_library_reads(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "all.gguf", "llama")
    writer.add_string("text", "größer\n")
    writer.add_array("strings", ["", "a", "é"])
    writer.add_array("floats", [0.5, -1.0])
    writer.add_array("numbers", [1, -2, 3])
    for kind, value in {
        "uint8": 255,
        "int8": -1,
        "uint16": 65535,
        "int16": -2,
        "uint32": 2**32 - 1,
        "int32": -3,
    }.items():
        getattr(writer, f"add_{kind}")(kind, value)
    for kind, value in {"uint64": 2**64 - 1, "int64": -4, "float32": 0.25, "float64": 0.1, "bool": True}.items():
        getattr(writer, f"add_{kind}")(kind, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    fields = gguf.GGUFReader(tmp_path / "all.gguf").fields
    theirs = {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")}
    assert len(theirs) == 16
    assert read_gguf(tmp_path / "all.gguf").metadata == theirs
