"""Which prompts are computed together, and on which device: fixed by the prompts and the batch size alone.

So neither the number of devices nor an interruption changes what shares a batch, hence any digit of the results; the
number of threads may, as it changes the order of sums on a CPU.
"""

from collections.abc import Collection, Iterator, Sequence

from torch.utils.data import Sampler


def plan_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """All indices once, those of similar length together, the longest first: if memory is short, that shows at once."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


class UnrepeatedBatches(Sampler[tuple[int, bool]]):
    """The numbers of one rank's batches, each with whether it counts: each batch counts on exactly one rank.

    Every rank gets equally many, since ranks that share a model's weights have to run it equally often; what is
    lacking at the end is filled up with a batch that does not count.

    Args:
        pending: numbers of the batches that are to be computed.
        rank: of this process.
        ranks: how many there are.
    """

    def __init__(self, pending: Collection[int], rank: int, ranks: int) -> None:
        self.pending = sorted(pending)
        self.rank = rank
        self.ranks = ranks

    def __len__(self) -> int:
        return -(-len(self.pending) // self.ranks)

    def __iter__(self) -> Iterator[tuple[int, bool]]:
        for start in range(0, len(self.pending), self.ranks):
            place = start + self.rank
            # The last batches are those of the shortest prompts: the cheapest to repeat.
            yield (self.pending[place], True) if place < len(self.pending) else (self.pending[-1], False)
