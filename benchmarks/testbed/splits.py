"""Splits by group: relatives (one scaffold, one family of sequences) never straddle training, validation and test."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Literal

Split = Literal["train", "validation", "test"]
Rows = list[dict[str, str]]
Tables = dict[str, Rows]

VALIDATION_SHARE = 0.08
TEST_SHARE = 0.25
# A group this large says more about itself than about its kind, so it is for training only.
LARGEST_EVALUATED_GROUP = 20


def stable_fraction(text: str) -> float:
    """A number in [0, 1) that looks random and depends on nothing but the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


def assign_splits(groups: Sequence[str]) -> list[Split]:
    """The split of every item, given its group: all items of a group share one."""
    sizes = Counter(groups)
    return [_split_of_group(group, sizes[group]) for group in groups]


def _split_of_group(group: str, size: int) -> Split:
    fraction = stable_fraction(group)
    if size > LARGEST_EVALUATED_GROUP or fraction >= VALIDATION_SHARE + TEST_SHARE:
        return "train"
    return "test" if fraction < TEST_SHARE else "validation"


def stratified_order(identifiers: Sequence[str], labels: Sequence[str]) -> list[int]:
    """The items' indices in a fixed random order, every prefix of which has nearly the label shares of the whole."""
    by_label: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for index, (identifier, label) in enumerate(zip(identifiers, labels, strict=True)):
        by_label[label].append((stable_fraction(f"order of {identifier}"), index))
    # The items of each label are spread evenly, at random offsets, over the whole length.
    places = [
        ((rank + fraction) / len(members), index)
        for members in by_label.values()
        for rank, (fraction, index) in enumerate(sorted(members))
    ]
    return [index for _, index in sorted(places)]


def rows_in_stratified_order(rows: Rows, label: str) -> Rows:
    """Rows with an `id`, so that the first ones are a fair sample of all; `label` is the column that stratifies."""
    order = stratified_order([row["id"] for row in rows], [row[label] for row in rows])
    return [rows[place] for place in order]


def with_balanced_labels(tables: Tables, label: str) -> Tables:
    """Validation and test with as many rows of every label as of the rarest; training as it is.

    Areas under the ROC curve do not depend on the share of a label, but with few rows of one they are noise.
    """
    balanced: Tables = {}
    for split, rows in tables.items():
        fewest = min(Counter(row[label] for row in rows).values(), default=0)
        taken: Counter[str] = Counter()
        kept = []
        for row in rows_in_stratified_order(rows, label):
            taken[row[label]] += 1
            if split == "train" or taken[row[label]] <= fewest:
                kept.append(row)
        balanced[split] = rows_in_stratified_order(kept, label)
    return balanced


def with_shuffled_partners(tables: Tables, column: str) -> Tables:
    """Each row with the value of another row of its split in a column, by a fixed random permutation."""
    shuffled: Tables = {}
    for split, rows in tables.items():
        order = sorted(range(len(rows)), key=lambda place: stable_fraction(f"partner of {rows[place]['id']}"))
        partner = dict(zip(order, [*order[1:], *order[:1]], strict=True))
        shuffled[split] = [{**row, column: rows[partner[place]][column]} for place, row in enumerate(rows)]
    return shuffled


def cluster_sequences(sequences: Sequence[str], k: int = 3, overlap: float = 0.5) -> list[str]:
    """A cluster name per sequence; two sequences in different clusters share less than `overlap` of their k-mers.

    The share is of the shorter sequence's k-mers, so a fragment lands in the cluster of the whole. Clusters
    are the connected components of "shares at least that much", named by their alphabetically first member.
    """
    kmers = [{sequence[i : i + k] for i in range(len(sequence) - k + 1)} or {sequence} for sequence in sequences]
    parent = list(range(len(sequences)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    holders: dict[str, list[int]] = defaultdict(list)
    for index, own in enumerate(kmers):
        shared = Counter(other for kmer in own for other in holders[kmer])
        for other, count in shared.items():
            if count >= overlap * min(len(own), len(kmers[other])):
                parent[root(index)] = root(other)
        for kmer in own:
            holders[kmer].append(index)

    names: dict[int, str] = {}
    for index, sequence in enumerate(sequences):
        names[root(index)] = min(sequence, names.get(root(index), sequence))
    return [names[root(index)] for index in range(len(sequences))]
