"""The study's result files, packed beside the page that was made of them: every answer behind every number.

    python -m benchmarks.testbed.study.archive unpack

puts them where the study keeps its results: `python -m benchmarks.testbed.study.page` makes the page of them, and
`make testbed` only does what is missing. The specialists of one training are there too, so that its rows can be merged
and evaluated again without training. `pack` is its reverse.
"""

import argparse
import io
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.testbed.data import MODALITIES
from benchmarks.testbed.study.coefficients import SHOWN_COEFFICIENTS
from benchmarks.testbed.study.jobs import DONE_FILE
from benchmarks.testbed.study.places import Places
from benchmarks.testbed.study.rows import CHOOSING_SEED
from benchmarks.testbed.study.scoring import CHOICE_FILE, MERGE_FILE
from benchmarks.testbed.study.specialists import TRAININGS
from esmerge.errors import InputError
from esmerge.results import COEFFICIENTS_FILE, RECORD_FILE, write_whole
from lightning_modules.evaluation_results import RESULTS_FOLDER

ARCHIVES = Path(__file__).parent / "archives"
# More than one training's would be too large.
SPECIALISTS_SEED = 42
_BASE_FIELD = b'"base_model_name_or_path": "'
_KEPT = (CHOICE_FILE, DONE_FILE, MERGE_FILE, RECORD_FILE)


def pack(places: Places, folder: Path) -> list[Path]:
    """Pack all result files: an archive for each training's test data and one for validation data; and specialists.

    The same results give the same bytes.

    Args:
        folder: to write into; archives of which there are no results stay as they are.

    Returns:
        The archives that were written.

    Raises:
        InputError: if an archive holds more than is there now.
    """
    parts = {f"test-{own}": [places.test(own, "any").parent, places.training(own, "any").parent] for own in TRAININGS}
    parts["validation"] = [places.validation("any").parent, places.probe_size("any", 0).parent.parent]
    packed = {name: [file for part in own for file in _results(places, part)] for name, own in parts.items()}
    packed[f"specialists-{SPECIALISTS_SEED}"] = list(_specialists(places))
    written = []
    folder.mkdir(parents=True, exist_ok=True)
    for name, found in packed.items():
        if files := sorted(found):
            written.append(folder / f"{name}.tar.xz")
            _check_nothing_is_lost(written[-1], files, places.root)
            _write(written[-1], files, places.root)
    return written


def _results(places: Places, folder: Path) -> Iterator[Path]:
    # Coefficients are shown of some; those of others would be most of the archive.
    shown = [places.test(CHOOSING_SEED, name) / COEFFICIENTS_FILE for name in SHOWN_COEFFICIENTS]
    for file in folder.rglob("*"):
        kept = file.name in _KEPT or file.parent.name == RESULTS_FOLDER or file.parent == folder or file in shown
        if file.is_file() and kept:
            yield file


def _specialists(places: Places) -> Iterator[Path]:
    for name in MODALITIES:
        folder = places.model(SPECIALISTS_SEED, name)
        yield from (file for file in folder.rglob("*") if file.is_file() and folder / "logs" not in file.parents)


def _check_nothing_is_lost(archive: Path, files: list[Path], root: Path) -> None:
    if not archive.exists():
        return
    with tarfile.open(archive) as packed:
        lost = set(packed.getnames()) - {file.relative_to(root).as_posix() for file in files}
    if lost:
        raise InputError(f"{archive} has {min(lost)}, {root} has not: unpack it first, or delete it to start anew.")


def _write(archive: Path, files: list[Path], root: Path) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:xz", preset=9) as packed:
        for file in files:
            own = file.read_bytes()
            if file.suffix in (".json", ".yaml"):  # whose machine it was is nobody's business
                own = own.replace(f"{root.parent}/".encode(), b"")
            entry = tarfile.TarInfo(file.relative_to(root).as_posix())  # of no owner and no time
            entry.size = len(own)
            packed.addfile(entry, io.BytesIO(own))
    write_whole(archive, content.getvalue())


def unpack(places: Places, folder: Path) -> int:
    """Put packed result files where they belong; those that are there already stay.

    Returns:
        How many files were written.

    Raises:
        InputError: if there are no archives.
    """
    archives = sorted(folder.glob("*.tar.xz"))
    if not archives:
        raise InputError(f"{folder} has no archives of results; run the study.")
    places.root.mkdir(parents=True, exist_ok=True)
    count = 0
    for archive in archives:
        with tarfile.open(archive) as packed:
            missing = [entry for entry in packed if not (places.root / entry.name).exists()]
            packed.extractall(places.root, missing, filter="data")
        for entry in missing:
            if entry.name.endswith("/adapter_config.json"):
                _name_base(places.root / entry.name)
        count += len(missing)
    return count


def _name_base(adapter_config: Path) -> None:
    """Undo what packing does to the base's path."""
    content = adapter_config.read_bytes()
    if _BASE_FIELD + b"/" not in content:
        cache = f"{adapter_config.parents[3]}/".encode()
        adapter_config.write_bytes(content.replace(_BASE_FIELD, _BASE_FIELD + cache))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("pack", "unpack"))
    if parser.parse_args().action == "pack":
        for file in pack(Places.usual(), ARCHIVES):
            print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")
    else:
        print(f"{unpack(Places.usual(), ARCHIVES)} files were missing")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"Error: {error}")
