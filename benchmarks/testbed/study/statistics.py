"""What few seeds and tasks tell: intervals and paired tests. Pure functions."""

import math
import statistics
from collections.abc import Sequence

import torch
from torchmetrics.functional import spearman_corrcoef

# Of Student's t distribution, two-sided 95 %, by the number of values.
_T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % confidence interval of the mean of 2 to 10 values by Student's t; NaN of a single value."""
    if len(values) < 2:
        return math.nan
    return _T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's: how well one order tells the other, from -1 to 1."""
    found = spearman_corrcoef(torch.tensor(first, dtype=torch.float64), torch.tensor(second, dtype=torch.float64))
    return float(found)


def sign_flip_p_value(differences: Sequence[float]) -> float:
    """Two-sided p-value of a mean difference: the share of all choices of signs whose mean is as far from zero.

    The exact paired permutation test (Fisher 1935), for up to 20 differences that are independent of each other.
    """
    values = torch.tensor(differences, dtype=torch.float64)
    observed = abs(float(values.sum()))
    sums = torch.zeros(1, dtype=torch.float64)
    for value in values:
        sums = torch.cat([sums + value, sums - value])
    return int((sums.abs() >= observed - 1e-12).sum()) / len(sums)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number (Holm 1979)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted
