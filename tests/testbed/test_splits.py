import random
from collections import Counter
from itertools import combinations

from benchmarks.testbed.splits import (
    LARGEST_EVALUATED_GROUP,
    TEST_SHARE,
    VALIDATION_SHARE,
    assign_splits,
    cluster_sequences,
    stratified_order,
)


def shared_kmers(a, b, k=3):
    first, second = ({sequence[i : i + k] for i in range(len(sequence) - k + 1)} for sequence in (a, b))
    return len(first & second) / min(len(first), len(second))


def test_a_group_has_one_split_whatever_else_there_is():
    groups = [f"group {number % 300}" for number in range(1000)]
    splits = dict(zip(groups, assign_splits(groups), strict=True))
    assert [splits[group] for group in groups] == assign_splits(groups)
    assert assign_splits(groups[:300]) == [splits[group] for group in groups[:300]]


def test_splits_have_about_their_shares():
    counts = Counter(assign_splits([str(number) for number in range(5000)]))
    assert abs(counts["test"] / 5000 - TEST_SHARE) < 0.02
    assert abs(counts["validation"] / 5000 - VALIDATION_SHARE) < 0.02


def test_large_groups_are_for_training():
    for number in range(20):
        assert set(assign_splits([f"large {number}"] * (LARGEST_EVALUATED_GROUP + 1))) == {"train"}


def test_every_prefix_is_stratified():
    labels = ["common"] * 90 + ["rare"] * 10
    order = stratified_order([str(number) for number in range(100)], labels)
    assert sorted(order) == list(range(100))
    assert order != sorted(order)
    for length in (20, 50, 80):
        assert abs(sum(labels[index] == "rare" for index in order[:length]) - length / 10) <= 1


def test_sequences_in_different_clusters_differ():
    generator = random.Random(0)
    parents = ["".join(generator.choices("ACDEFGHIKL", k=25)) for _ in range(20)]
    fragments = [parent[generator.randrange(10) :][:12] for parent in parents]
    sequences = [*parents, *fragments, "AC", "AC", "A"]
    clusters = cluster_sequences(sequences)
    for (a, cluster_a), (b, cluster_b) in combinations(zip(sequences, clusters, strict=True), 2):
        if cluster_a != cluster_b and min(len(a), len(b)) >= 3:
            assert shared_kmers(a, b) < 0.5
    assert clusters[:20] == [
        min(cluster, parent) for cluster, parent in zip(clusters[20:40], clusters[:20], strict=True)
    ]
    # The order of the sequences changes neither who belongs together nor the clusters' names.
    assert dict(zip(sequences[::-1], cluster_sequences(sequences[::-1]), strict=True)) == dict(
        zip(sequences, clusters, strict=True)
    )
