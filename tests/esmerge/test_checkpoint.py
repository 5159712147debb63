"""Safetensors files are read and written as other libraries write and read them."""

import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from esmerge.checkpoint import Checkpoint, CheckpointWriter
from esmerge.errors import InputError

TENSORS = {
    "bytes": torch.arange(7, dtype=torch.uint8),
    "half": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "quarter": torch.tensor([[0.5, -2.0]]).to(torch.float8_e4m3fn),
    "flags": torch.tensor([True, False, True]),
    "double": torch.linspace(0, 1, 6, dtype=torch.float64).view(2, 3),
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
}


def layout(tensors):
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def write(folder, tensors, **options):
    writer = CheckpointWriter(folder, layout(tensors), **options)
    for name in reversed(tensors):
        writer.write(name, tensors[name])
    writer.finish()


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(*(values.reshape(-1).view(torch.uint8) for values in (actual[name], tensor))), name
        assert actual[name].shape == tensor.shape, name


def test_written_file_is_read_by_safetensors(tmp_path):
    write(tmp_path, TENSORS, metadata={"note": "é"})
    assert_equal(load_file(tmp_path / "model.safetensors"), TENSORS)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "é"}
    with Checkpoint.open(tmp_path) as checkpoint:
        aligned = [checkpoint.info(name).offset % tensor.itemsize == 0 for name, tensor in TENSORS.items()]
    assert all(aligned), "tensors start at multiples of their item size, so that files can be mapped"


def test_a_system_without_fdatasync(tmp_path, monkeypatch):
    """As macOS; what is larger than 128 MB is flushed while it is written."""
    monkeypatch.delattr(os, "fdatasync", raising=False)
    monkeypatch.setattr("esmerge.checkpoint.FLUSH_BYTES", 1)
    write(tmp_path, TENSORS)
    assert_equal(load_file(tmp_path / "model.safetensors"), TENSORS)


def test_file_of_safetensors_is_read(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"note": "é"})
    with Checkpoint.open(tmp_path) as checkpoint:
        assert_equal({name: checkpoint.read(name) for name in checkpoint}, TENSORS)
        assert checkpoint.metadata == {"note": "é"}
        assert torch.equal(checkpoint.read_rows("half", torch.tensor([2, 0])), TENSORS["half"][[2, 0]])
        assert checkpoint.read("half", torch.float32).dtype == torch.float32


def test_values_are_converted_to_the_announced_dtype(tmp_path):
    values = torch.linspace(-1, 1, 12).view(4, 3)
    writer = CheckpointWriter(tmp_path, {"values": (torch.bfloat16, (3, 4))})
    writer.write("values", values.T)
    writer.finish()
    assert torch.equal(load_file(tmp_path / "model.safetensors")["values"], values.T.bfloat16())


def test_shards_and_index_are_those_of_transformers(llama, tmp_path):
    tensors = load_file(llama / "base" / "model.safetensors")
    write(tmp_path, tensors, max_shard_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards == [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for shard in shards:
        held = load_file(tmp_path / shard)
        assert set(held) == {name for name, file in index["weight_map"].items() if file == shard}
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= 20_000
    shutil.copy(llama / "base" / "config.json", tmp_path)
    assert_equal(dict(AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()), tensors)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert_equal({name: checkpoint.read(name) for name in checkpoint}, tensors)


def begin(folder):
    return CheckpointWriter(folder, layout(TENSORS), max_shard_bytes=50)


def test_goes_on_with_what_the_disk_has_as_it_was_written(tmp_path):
    """Whatever the order of the rows, or if some are written twice."""
    writer = begin(tmp_path)
    half = TENSORS["half"]
    for start, stop in ((1, 3), (0, 1)):
        writer.write_rows("half", start, half[start:stop])
    writer.complete("half", {"note": 1.5})
    writer.write_rows("double", 0, torch.zeros(2, 3))
    writer.write_rows("double", 1, TENSORS["double"][1:])
    writer.write_rows("double", 0, TENSORS["double"][:1])
    writer.complete("double")
    for name in ("scalar", "empty", "bytes"):
        writer.write(name, TENSORS[name])
    place = writer.places["bytes"]
    writer.close()
    with place.file.open("r+b") as stream:
        stream.seek(place.offset + place.nbytes - 1)
        stream.write(b"\0")
    again = begin(tmp_path)
    assert again.pending == {"bytes", "flags", "quarter"}
    assert again.notes == {"half": {"note": 1.5}, "double": None, "scalar": None, "empty": None}
    for name in sorted(again.pending):
        again.write(name, TENSORS[name])
    again.finish()
    with Checkpoint.open(tmp_path) as checkpoint:
        assert_equal({name: checkpoint.read(name) for name in checkpoint}, TENSORS)


def test_missing_tensor_is_no_finished_checkpoint(tmp_path):
    writer = CheckpointWriter(tmp_path, layout(TENSORS))
    writer.write("half", TENSORS["half"])
    with pytest.raises(RuntimeError, match="6 tensors were never written"):
        writer.finish()
    writer.close()


@pytest.mark.parametrize("shape", [(5, 3), (15,)])
def test_tensor_of_another_shape_is_refused(tmp_path, shape):
    writer = CheckpointWriter(tmp_path, layout(TENSORS))
    with pytest.raises(ValueError, match="half"):
        writer.write("half", torch.zeros(shape))
    writer.close()


def header_of(content):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x05\x00",
        (1 << 60).to_bytes(8, "little") + b"{}",
        header_of(b"{no json"),
        header_of([]),
        header_of({"a": 3}),
        header_of({"a": {"dtype": "F32", "shape": [2]}}),
        header_of({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}),
        header_of({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}) + b"\0" * 8,
        header_of({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}) + b"\0" * 8,
        header_of({"a": {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}}) + b"\0" * 8,
        header_of({"a": {"dtype": "F3", "shape": [2], "data_offsets": [0, 8]}}) + b"\0" * 8,
    ],
    ids=[
        "empty",
        "shorter than its length field",
        "length beyond the end",
        "no JSON",
        "a list",
        "no entry",
        "no offsets",
        "no data",
        "shape of another size",
        "offset before the data",
        "shape that is text",
        "unknown dtype",
    ],
)
def test_corrupt_file_is_named(tmp_path, content):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"model\.safetensors"):
        Checkpoint.open(tmp_path)


def test_tensor_in_two_shards_is_refused(tmp_path):
    for shard in ("a", "b"):
        save_file({"twice": torch.zeros(2)}, tmp_path / f"{shard}.safetensors")
    index = {"weight_map": {"twice": "a.safetensors", "other": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="twice is both in"):
        Checkpoint.open(tmp_path)


def test_file_that_shrinks_while_it_is_open(tmp_path):
    save_file({"values": torch.zeros(1000)}, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-100])
        with pytest.raises(InputError, match="became shorter"):
            checkpoint.read("values")
