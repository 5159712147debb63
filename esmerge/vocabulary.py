"""Vocabularies of specialists that have tokens of their own, and the one of the result."""

import filecmp
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from esmerge.errors import InputError
from esmerge.sources import read_json

logger = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer.json"
# Of tokenizers that were saved without a tokenizer.json: token -> id.
_VOCABULARY_FILES = ("vocab.json", "added_tokens.json")
_DEFAULTS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


@dataclass(frozen=True)
class Vocabulary:
    """The rows of the result's embeddings.

    Attributes:
        size: number of rows.
        owners: row -> the specialists (their indices) that alone have it: because the base has no such row, or no
            token there while they have. Other rows are merged.
        added: entries of tokenizer.json for the tokens that the base does not have, by ascending id.
    """

    size: int
    owners: dict[int, list[int]] = field(default_factory=dict)
    added: list[dict[str, Any]] = field(default_factory=list)


def join_vocabularies(base: Path, rows: int, specialists: Sequence[tuple[str, Path, int]]) -> Vocabulary:
    """The union of the base's vocabulary and the specialists'.

    Args:
        base: the base's folder.
        rows: of the base's embeddings.
        specialists: name, folder and number of rows of each.

    Raises:
        InputError: if one id stands for two tokens, one token has two ids, or no tokenizer could hold them all.
    """
    # Tokenizers are large files, and most specialists have the base's.
    others = [(index, name, folder) for index, (name, folder, _) in enumerate(specialists) if _differs(base, folder)]
    known = tokens_of(base) if others else {}
    ids = {token: token_id for token_id, token in known.items()}
    source = dict.fromkeys(known, "the base")
    owners: dict[int, list[int]] = {}
    added: dict[int, dict[str, Any]] = {}
    size = max([rows, *(count for _, _, count in specialists)])
    for index, name, folder in others:
        entries = _added_tokens(folder)
        for token_id, token in tokens_of(folder).items():
            if token_id in source and known[token_id] != token:
                raise InputError(
                    f"token {token_id} is {known[token_id]!r} in {source[token_id]} and {token!r} in {name}: "
                    "their vocabularies cannot be joined; move one of the tokens to a free id."
                )
            if token_id not in source and ids.get(token, token_id) != token_id:
                raise InputError(
                    f"token {token!r} has the id {ids[token]} in {source[ids[token]]} and {token_id} in {name}: "
                    "their vocabularies cannot be joined; give it the same id in both."
                )
            if token_id not in source and token_id >= size:
                logger.warning(
                    "%s has the token %r (%d), but no embedding for it: it is left out", name, token, token_id
                )
            elif (known and token_id not in source) or token_id in added:
                owners.setdefault(token_id, []).append(index)
                added[token_id] = entries.get(token_id, {"id": token_id, "content": token})
                known[token_id], ids[token], source[token_id] = token, token_id, source.get(token_id, name)
    for row in range(rows, size):
        # Where nobody has a token, rows pad a vocabulary; they do not count beside those of tokens.
        owners.setdefault(row, [index for index, (_, _, count) in enumerate(specialists) if row < count])
    if added:
        _check_tokenizer(base, known, source)
    return Vocabulary(
        size, {row: owned for row, owned in owners.items() if row < size}, [added[i] for i in sorted(added)]
    )


def _differs(base: Path, folder: Path) -> bool:
    """Whether a specialist may have other tokens than the base."""
    known, own = base / TOKENIZER_FILE, folder / TOKENIZER_FILE
    if own.exists():
        return not (known.exists() and filecmp.cmp(known, own, shallow=False))
    return any((folder / name).exists() for name in _VOCABULARY_FILES)


def _check_tokenizer(base: Path, known: Mapping[int, str], source: Mapping[int, str]) -> None:
    """Find out whether the base's tokenizer can take more tokens."""
    if not (base / TOKENIZER_FILE).exists():
        raise InputError(
            f"{base} has no {TOKENIZER_FILE}, which the specialists' own tokens are added to: load its tokenizer with "
            "transformers and save it there."
        )
    # Tokens that are added get the next id, whatever the file says.
    missing = next((token_id for token_id in range(max(known)) if token_id not in known), None)
    if missing is not None:
        after = min(token_id for token_id in known if token_id > missing)
        raise InputError(
            f"the joined vocabulary has no token {missing}, but {known[after]!r} ({after}) of {source[after]} after "
            "it: a tokenizer needs ids without gaps."
        )


def write_tokenizer(folder: Path, vocabulary: Vocabulary) -> None:
    """Add the specialists' tokens to the copy of the base's tokenizer in `folder`."""
    if not vocabulary.added:
        return
    content = read_json(folder / TOKENIZER_FILE)
    new = [{**_DEFAULTS, **entry} for entry in vocabulary.added]
    content["added_tokens"] = [*content.get("added_tokens", []), *new]
    (folder / TOKENIZER_FILE).write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
    config_file = folder / "tokenizer_config.json"
    if config_file.exists():
        config = read_json(config_file)
        if "added_tokens_decoder" in config:
            for entry in new:
                decoded = {key: value for key, value in entry.items() if key != "id"}
                config["added_tokens_decoder"][str(entry["id"])] = decoded
            config_file.write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _added_tokens(folder: Path) -> dict[int, dict[str, Any]]:
    file = folder / TOKENIZER_FILE
    return {entry["id"]: entry for entry in read_json(file).get("added_tokens", [])} if file.exists() else {}


def tokens_of(folder: Path) -> dict[int, str]:
    """Id -> token; empty for a folder without a tokenizer that names its tokens in JSON."""
    file = folder / TOKENIZER_FILE
    if not file.exists():
        files = [folder / name for name in _VOCABULARY_FILES if (folder / name).exists()]
        return {token_id: token for file in files for token, token_id in read_json(file).items()}
    content = read_json(file)
    vocab = content.get("model", {}).get("vocab", {})
    if isinstance(vocab, list):  # unigram models: [[token, score], ...]
        tokens = {index: entry[0] for index, entry in enumerate(vocab)}
    else:
        tokens = {token_id: token for token, token_id in vocab.items()}
    return tokens | {entry["id"]: entry["content"] for entry in content.get("added_tokens", [])}
