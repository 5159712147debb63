"""The result folder: staged beside its place, filled, and renamed when it is complete."""

import fcntl
import json
import platform
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from esmerge import __version__
from esmerge.checkpoint import JOURNALS, Checkpoint, CheckpointWriter
from esmerge.errors import GOES_ON, LESS_MEMORY, NO_ROOM, InputError, Interrupted, OutOfMemory, WorkerKilled
from esmerge.hub import CHAT_TEMPLATES_FOLDER
from esmerge.memory import is_out_of_memory
from esmerge.remote_code import code_files

COEFFICIENTS_FILE = "coefficients.safetensors"
RECORD_FILE = "esmerge.yaml"
# What belongs to a model beside its weights.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
)
_CONFIG_FILES = ("config.json", "generation_config.json")


def check_output(output: Path) -> None:
    """Raise `InputError` if the output exists or its folder cannot be written."""
    if output.exists() or output.is_symlink():
        raise InputError(f"the output {output} exists: choose another folder or remove it first.")


def check_room(output: Path, nbytes: int) -> None:
    """Raise `InputError` if the output's disk has no room for so many bytes.

    What an unfinished run left there counts as room: it is either taken over or removed.
    """
    place = next(folder for folder in output.absolute().parents if folder.exists())
    left = [entry.lstat().st_blocks * 512 for entry in _staged(output).rglob("*")]
    needed, disk = nbytes - sum(left), shutil.disk_usage(place)
    # Some file systems of other machines do not know their size.
    if disk.total and needed > disk.free:
        raise InputError(
            f"the output {output} needs {needed / 1e9:.2f} GB, and its disk has {disk.free / 1e9:.2f} GB free: "
            "free some space or choose another output."
        )


def _staged(output: Path) -> Path:
    return output.parent / f".{output.name}.partial"


@contextmanager
def staged_folder(output: Path, fingerprint: str | None, resume: bool, same_threads: bool = False) -> Iterator[Path]:
    """A hidden folder beside `output` that takes its name at the end, or is removed if anything fails.

    What a killed process left there is kept if `resume` is set and it was at the same work. So is what is complete when
    the user, the end of memory or a full disk stops the work, of which the inputs know nothing.

    Args:
        fingerprint: of the work; None if nothing can go on with it.
        same_threads: whether only as many threads can go on with it.

    Raises:
        InputError: if the folder cannot be written, another process is at it, or what is there is other work.
        Interrupted: at Ctrl-C, if the work can be gone on with.
    """
    check_output(output)
    staged = _staged(output)
    made = [folder for folder in (staged, *staged.parents) if not folder.exists()]
    try:
        staged.mkdir(parents=True, exist_ok=True)
        lock = (staged / ".lock").open("w")
    except OSError as error:
        _remove_empty(made)
        raise InputError(f"the output {output} cannot be written ({error.strerror}).") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"another process is writing {output}: wait for it, or choose another folder.") from error
        mark = staged / ".fingerprint"
        if resume and mark.exists() and mark.read_text() != fingerprint:
            raise InputError(
                f"what is left of {output} is of another recipe or of other inputs, or was begun with another number "
                "of threads: start again without --resume."
            )
        try:
            if not resume or not mark.exists():
                _empty(staged)
                mark.write_text(fingerprint or "")
            yield staged
            for file in (*staged.rglob(JOURNALS), mark, staged / ".lock"):
                file.unlink()
            staged.rename(output)
        except BaseException as error:
            if fingerprint is not None and any(journal.stat().st_size for journal in staged.glob(JOURNALS)):
                _raise_resumable(error, f"{GOES_ON} from what is in {staged}", same_threads)
            shutil.rmtree(staged, ignore_errors=True)
            _remove_empty(made)
            raise


def _raise_resumable(error: BaseException, goes_on: str, same_threads: bool) -> None:
    """Raise an error that leaves what is complete as good as it was, with the sentence that tells how to go on."""
    if isinstance(error, KeyboardInterrupt):
        raise Interrupted(goes_on) from error
    remedy = f"{'free some memory' if same_threads else LESS_MEMORY}; {goes_on}"
    if isinstance(error, WorkerKilled):
        raise WorkerKilled(remedy) from error
    if is_out_of_memory(error):
        raise OutOfMemory(error, remedy) from error
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        error.add_note(goes_on)
        raise error


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders, innermost first, as far as there is nothing in them."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.name != ".lock":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def copy_tokenizer(base: Path, folder: Path, with_code: bool = False) -> None:
    """Copy the tokenizer's files, as far as there are any.

    Args:
        with_code: whether the user trusts the code that comes with the base.
    """
    templates = [f"{CHAT_TEMPLATES_FOLDER}/{file.name}" for file in (base / CHAT_TEMPLATES_FOLDER).glob("*.jinja")]
    _copy(base, folder, [*TOKENIZER_FILES, *templates])
    if with_code:
        _copy(base, folder, [file.name for file in code_files(base)])


def copy_model_files(base: Path, folder: Path, changes: Mapping[str, Any], with_code: bool = False) -> None:
    """Copy tokenizer and configs of a full checkpoint, with `changes` in its config.json.

    Args:
        with_code: whether the user trusts the base's own code; otherwise the result neither has nor names it.
    """
    copy_tokenizer(base, folder, with_code)
    _copy(base, folder, _CONFIG_FILES)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if changes or (config.get("auto_map") and not with_code):
        if "dtype" in changes:
            config.pop("torch_dtype", None)
        if not with_code:
            config.pop("auto_map", None)
        write_json(folder / "config.json", {**config, **changes})


def _copy(base: Path, folder: Path, names: Sequence[str]) -> None:
    for name in names:
        if (base / name).exists():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(base / name, folder / name)


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file, all of it or nothing: what was there before stays until then."""
    part = file.with_name(f".{file.name}.part")
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    part.replace(file)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object as transformers and PEFT format theirs."""
    file.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def adapter_config(
    modules: Mapping[str, tuple[int, float]],
    base_tensors: Sequence[str],
    base_model: str,
    revision: str | None,
    task_type: str | None,
) -> dict[str, Any]:
    """An adapter_config.json that PEFT loads.

    Args:
        modules: rank and alpha of each adapted module, by its name in the base.
        base_tensors: names of all tensors of the base.
    """
    ranks = Counter(rank for rank, _ in modules.values())
    alphas = Counter(alpha for _, alpha in modules.values())
    rank, alpha = ranks.most_common(1)[0][0], alphas.most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "revision": revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _integral(alpha),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "target_modules": target_modules(list(modules), base_tensors),
        "rank_pattern": {name: r for name, (r, _) in modules.items() if r != rank},
        "alpha_pattern": {name: _integral(a) for name, (_, a) in modules.items() if a != alpha},
    }


def _integral(value: float) -> float | int:
    return int(value) if value == int(value) else value


def target_modules(modules: Sequence[str], base_tensors: Sequence[str]) -> list[str]:
    """PEFT's target_modules for exactly these modules: their last names if those suffice, else all names."""
    leaves = sorted({name.rpartition(".")[2] for name in modules})
    matched = {name.removesuffix(".weight") for name in base_tensors if name.endswith(".weight")}
    matched = {name for name in matched if name.rpartition(".")[2] in leaves}
    return leaves if matched == set(modules) else sorted(modules)


def write_tensors(
    file: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Sequence[str]] | None = None,
    blocks: Iterable[tuple[str, int, Tensor]] = (),
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Write a few tensors to a safetensors file.

    Args:
        metadata: values are stored as JSON lists.
        blocks: of float32 tensors too large to be held: name, first row, rows.
        shapes: of these, by name.
    """
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    layout |= {name: (torch.float32, tuple(shape)) for name, shape in (shapes or {}).items()}
    encoded = {key: json.dumps(list(value)) for key, value in (metadata or {}).items()}
    writer = CheckpointWriter(file.parent, layout, stem=file.stem, max_shard_bytes=1 << 62, metadata=encoded)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    for name, start, rows in blocks:
        writer.write_rows(name, start, rows)
    for name in shapes or {}:
        writer.complete(name)
    writer.finish()


@dataclass(frozen=True)
class StoredCoefficients:
    """What a result's coefficients.safetensors holds.

    Attributes:
        tensors: `alpha` [S, L], and from embedding signals `distances` [S, M, L] and `planes` [M, 1 + S, L, K, 2];
            `lambda.mean.<tensor>` and `lambda.std.<tensor>` [S].
        specialists, modalities: the names along S and M.
    """

    tensors: dict[str, Tensor]
    specialists: list[str]
    modalities: list[str]


def read_coefficients(folder: Path) -> StoredCoefficients:
    """The coefficients of the result in `folder`; `InputError` if it is no esmerge result."""
    file = folder / COEFFICIENTS_FILE
    if not folder.exists():
        raise InputError(f"the folder {folder} does not exist.")
    if not file.exists():
        raise InputError(f"{folder} is no esmerge result: it has no {COEFFICIENTS_FILE}.")
    with Checkpoint.open_file(file) as checkpoint:
        try:
            specialists, modalities = (json.loads(checkpoint.metadata[key]) for key in ("specialists", "modalities"))
        except (KeyError, ValueError) as error:
            raise InputError(f"{file} does not name its specialists and modalities in its metadata.") from error
        return StoredCoefficients({name: checkpoint.read(name) for name in checkpoint}, specialists, modalities)


@cache
def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    packages = ("torch", "transformers", "safetensors", "tokenizers")
    return {
        "esmerge": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write esmerge.yaml: the resolved recipe, what its inputs were, and what came out."""
    (folder / RECORD_FILE).write_text(record_text(record), encoding="utf-8")


def record_text(record: Mapping[str, Any]) -> str:
    """A record as esmerge.yaml holds it."""
    return yaml.safe_dump(dict(record), sort_keys=False, allow_unicode=True, width=100)
