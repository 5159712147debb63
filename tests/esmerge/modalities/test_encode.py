"""Items -> soft tokens: each once, in batches, kept on disk."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from esmerge.modalities import encode_items

ROOT = Path(__file__).parents[3]


def counting(encoder):
    """The encoder, and the sizes of the batches that it sees."""
    sizes = []
    forward = encoder.forward
    encoder.forward = lambda **features: sizes.append(len(next(iter(features.values())))) or forward(**features)
    return sizes


def test_each_item_once_and_in_order(make, run, esm_settings):
    modality, encoder = make(esm_settings)
    items = ["MKT", "MKTAYIAKQR", "MKT", "G", "ACDEF"]
    expected = [run(modality, encoder, [item])[0] for item in items]
    sizes = counting(encoder)
    found = encode_items(modality, encoder, items, 2, None, "", progress=False)
    assert sum(sizes) == 4
    assert max(sizes) == 2
    for tokens, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(tokens, wanted, rtol=0, atol=1e-5)


def test_kept_by_content(make, esm_settings, tmp_path):
    modality, encoder = make(esm_settings)
    first = encode_items(modality, encoder, ["MKT", "GG"], 8, tmp_path, "weights", progress=False)
    sizes = counting(encoder)
    again = encode_items(modality, encoder, ["GG", "MKT", "AA"], 8, tmp_path, "weights", progress=False)
    assert sizes == [1]
    assert torch.equal(again[0], first[1])
    assert torch.equal(again[1], first[0])
    encode_items(modality, encoder, ["MKT"], 8, tmp_path, "other weights", progress=False)
    changed = modality.model_copy(update={"max_residues": 2})
    encode_items(changed, encoder, ["MKT"], 8, tmp_path, "weights", progress=False)
    assert sizes == [1, 1, 1]


def test_a_damaged_file_is_made_anew(make, esm_settings, tmp_path):
    modality, encoder = make(esm_settings)
    [first] = encode_items(modality, encoder, ["MKT"], 8, tmp_path, "weights", progress=False)
    [file] = tmp_path.rglob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    [again] = encode_items(modality, encoder, ["MKT"], 8, tmp_path, "weights", progress=False)
    assert torch.equal(again, first)


@pytest.mark.parametrize("damage", ["truncated", "empty", "no tensor", "header", "metadata", "shape", "a folder"])
def test_damaged_files_are_made_anew(make, esm_settings, tmp_path, damage):
    modality, encoder = make(esm_settings)
    [first] = encode_items(modality, encoder, ["MKT"], 8, tmp_path, "weights", progress=False)
    [file] = tmp_path.rglob("*.safetensors")
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")

    def with_header(text):
        return len(text).to_bytes(8, "little") + text + content[8 + length :]

    damaged = {
        "truncated": content[:-20],
        "empty": b"",
        "no tensor": with_header(b"{}"),
        "header": with_header(b'{"soft_tokens": {"dtype": "F32", "shape": [-5, -16], "data_offsets": [0, 320]}}'),
        "metadata": with_header(b'{"__metadata__": 3}'),
        "shape": content.replace(b"[5,16]", b"[16,5]"),
    }
    if damage == "a folder":
        file.unlink()
        file.mkdir()
    else:
        assert damaged[damage] != content
        file.write_bytes(damaged[damage])
    sizes = counting(encoder)
    [again] = encode_items(modality, encoder, ["MKT"], 8, tmp_path, "weights", progress=False)
    assert sizes == [1]
    assert torch.equal(again, first)
    if damage != "a folder":
        assert file.read_bytes() == content


def test_what_soft_tokens_depend_on_is_in_the_key(make, esm_settings, tmp_path):
    modality, encoder = make(esm_settings)
    sizes = counting(encoder)

    def encode(modality=modality, weights="weights", dtype=torch.float32):
        encode_items(modality, encoder, ["MKT"], 8, tmp_path, weights, dtype=dtype, progress=False)
        return len(sizes)

    assert [encode(), encode()] == [1, 1]
    assert [encode(dtype=torch.bfloat16), encode(dtype=torch.bfloat16)] == [2, 2]
    assert encode(weights="other") == 3
    newer = type("Newer", (type(modality),), {"version": 2})
    assert encode(newer.model_validate(modality.model_dump())) == 4
    # What leads to the same features need not be encoded again.
    encode_items(modality, encoder, ["mkt", " MKT "], 8, tmp_path, "weights", progress=False)
    assert len(sizes) == 4
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert encode() == 5
    finally:
        torch.set_num_threads(threads)


def test_values_do_not_depend_on_what_else_is_encoded(make, esm_settings):
    """To the last bit, one at a time, as the probe's items are encoded on a CPU."""
    modality, encoder = make(esm_settings)
    items = ["MKTAYIAKQR" * 7, "GSHM", "ACDEFGHIKL" * 3]
    alone = [encode_items(modality, encoder, [item], 1, None, "", progress=False)[0] for item in items]
    together = encode_items(modality, encoder, items[::-1], 1, None, "", progress=False)[::-1]
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_without_a_place_to_keep_them(make, esm_settings, tmp_path, caplog):
    modality, encoder = make(esm_settings)
    (tmp_path / "file").write_text("")
    expected = encode_items(modality, encoder, ["MKT", "GG"], 8, None, "", progress=False)
    found = encode_items(modality, encoder, ["MKT", "GG"], 8, tmp_path / "file" / "cache", "", progress=False)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cannot be kept in" in caplog.text


PROGRAM = """
import sys
from pathlib import Path
import torch
from esmerge.modalities import encode_items, modality_from_settings
modality = modality_from_settings({"kind": "fingerprint", "placeholder": "<m>", "n_bits": 32}, "settings")
torch.manual_seed(0)
tokens = encode_items(modality, modality.build(256), ["C" * n for n in range(1, 30)], 4, Path(sys.argv[1]), "w")
print(float(torch.stack(tokens).double().sum()))
"""


def run_here(*command):
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, cwd=ROOT)


def test_several_writers_at_once(tmp_path):
    command = [sys.executable, "-c", PROGRAM, tmp_path / "cache"]
    writers = [subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, cwd=ROOT) for _ in range(3)]
    sums = [float(writer.communicate()[0]) for writer in writers]
    # What one finds done by another depends on chance, and the size of a batch changes the last digit.
    assert sums == pytest.approx([sums[0]] * 3, rel=1e-6)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 29
    assert not list((tmp_path / "cache").rglob("*.part"))


@pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], check=False).returncode != 0,
    reason="needs to mount a disk in a namespace of its own",
)
@pytest.mark.parametrize("options", ["size=100k", "ro"], ids=["full disk", "read-only"])
def test_disk_that_takes_nothing(tmp_path, options):
    expected = run_here(sys.executable, "-c", PROGRAM, tmp_path / "elsewhere")
    disk = tmp_path / "disk"
    disk.mkdir()
    script = 'mount -t tmpfs -o "$1" tmpfs "$2"; shift; cd "$0"; "$2" -c "$3" "$1/cache"; find "$1" -name "*.part"'
    done = run_here("unshare", "-rm", "sh", "-c", script, ROOT, options, disk, sys.executable, PROGRAM)
    assert done.stdout == expected.stdout, done.stderr
    assert done.stderr.count("cannot be kept in") == 1
