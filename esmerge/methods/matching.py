"""Methods that match what linear layers make of the specialists' own inputs, by least squares.

Tensors that are no weight of a linear layer inside a decoder layer have no such inputs and are averaged.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from esmerge.methods.arithmetic import scaled_sum
from esmerge.methods.registry import Finite, merging_method

Shrink = Annotated[float, Field(ge=0, lt=1)]
# At which positions inputs of linear layers are taken: of the specialist's own modality, of that and of what follows
# the last item, all up to the last item, or all of a prompt.
Positions = Literal["own", "own_and_after", "all", "whole"]
# What recipes call them: `all` of a prompt that one specialist alone reads is the whole of it.
Tokens = Literal["own", "own_and_after", "all"]
Terms = Literal["equal", "as_read"]
Activations = Literal["specialist", "merged"]
# Columns or rows of the inputs that are in float64 at a time.
_COLUMNS = _ROWS = 1 << 10


@dataclass(frozen=True)
class Matching:
    """The delta D of a weight that matches specialists' deltas D_i on inputs X_i, for deltas in blocks of rows.

    It minimises sum_i tr (D - D_i) G_i (D - D_i)^T, which with `shrink` 1 would be sum_i c_i |(D - D_i) X_i^T|^2:
    G_i = c_i X_i^T X_i, whose off-diagonal elements are multiplied by `shrink` (RegMean, Jin et al. 2023, arXiv
    2212.09849, section 3.2). So D = (sum_i D_i G_i) (sum_i G_i)^-1. Where the inputs are fewer than their features, no
    matrix of features by features is made (Woodbury's identity). All in float64.

    Attributes:
        inputs: X_i [n_i, in].
        scales: c_i.
        diagonals: of X_i^T X_i, float64 [in].
        shrink: in [0, 1).
        remainder: diagonal of the sum of all G_i that is not shared with products of inputs, float64 [in].
        factor: Cholesky factor of the sum of all G_i [in, in], or of the identity plus the products of inputs [n, n].
    """

    inputs: Sequence[Tensor]
    scales: Sequence[float]
    diagonals: Sequence[Tensor]
    shrink: float
    remainder: Tensor
    factor: Tensor

    @classmethod
    def of(cls, inputs: Sequence[Tensor], weights: Sequence[float], *, shrink: float, terms: Terms) -> "Matching":
        """Prepare the solution.

        Args:
            inputs: X_i [n_i, in] for each specialist.
            weights: of the specialists.
            terms: `equal` divides each X_i^T X_i by its trace, so that neither the number nor the size of its inputs
                makes a specialist count more; `as_read` leaves them as they are.
        """
        diagonals = [_squared_norms(x) for x in inputs]
        totals = [float(diagonal.sum()) if terms == "equal" else 1.0 for diagonal in diagonals]
        scales = [weight / total if total > 0 else 0.0 for weight, total in zip(weights, totals, strict=True)]
        remainder = sum(
            (scale * (1 - shrink) * diagonal for scale, diagonal in zip(scales, diagonals, strict=True)),
            torch.zeros_like(diagonals[0]),
        )
        # A feature that is always zero tells nothing; any number keeps its column of the result zero.
        remainder = torch.where(remainder > 0, remainder, 1.0)
        width, count = len(remainder), sum(map(len, inputs))
        roots = _roots(scales, shrink)
        if count < width:
            system = torch.eye(count, dtype=torch.float64, device=remainder.device)
            for start in range(0, width, _COLUMNS):
                part = _stacked(inputs, roots, slice(start, start + _COLUMNS))
                system.addmm_(part / remainder[start : start + _COLUMNS], part.T)
        else:
            system = torch.diag(remainder)
            for x, root in zip(inputs, roots, strict=True):
                for part in x.split(_ROWS):
                    scaled = part.double().mul_(root)
                    system.addmm_(scaled.T, scaled)
        return cls(inputs, scales, diagonals, shrink, remainder, torch.linalg.cholesky(system, out=system))

    def product(self, index: int, rows: Tensor) -> Tensor:
        """Rows [h, in] of a specialist's delta, or of its factor A, times G_i; float64."""
        rows, x = rows.double(), self.inputs[index]
        embeddings = torch.zeros(len(rows), len(x), dtype=torch.float64, device=rows.device)
        spans = [slice(start, start + _COLUMNS) for start in range(0, x.shape[1], _COLUMNS)]
        for span in spans:
            embeddings.addmm_(rows[:, span], x[:, span].double().T)
        product = rows * (self.diagonals[index] * (1 - self.shrink))
        for span in spans:
            product[:, span].addmm_(embeddings, x[:, span].double(), alpha=self.shrink)
        return product.mul_(self.scales[index])

    def solve(self, rows: Tensor) -> Tensor:
        """Rows [h, in], float64, times the inverse of the sum of all G_i."""
        if len(self.factor) == len(self.remainder):
            return torch.cholesky_solve(rows.T, self.factor).T
        divided = rows / self.remainder
        roots = _roots(self.scales, self.shrink)
        right = torch.zeros(len(self.factor), len(rows), dtype=torch.float64, device=rows.device)
        spans = [slice(start, start + _COLUMNS) for start in range(0, rows.shape[1], _COLUMNS)]
        for span in spans:
            right.addmm_(_stacked(self.inputs, roots, span), divided[:, span].T)
        solved = torch.cholesky_solve(right, self.factor)
        for span in spans:
            part = _stacked(self.inputs, roots, span) / self.remainder[span]
            divided[:, span].addmm_(solved.T, part, alpha=-1)
        return divided

    def merge(self, rows: Sequence[Tensor]) -> Tensor:
        """Rows of the merged delta from the same rows [h, in] of each specialist's delta; in their dtype."""
        total = self.product(0, rows[0])
        for index, own in enumerate(rows[1:], start=1):
            total += self.product(index, own)
        return self.solve(total).to(rows[0].dtype)


def _roots(scales: Sequence[float], shrink: float) -> list[float]:
    """What inputs are multiplied by, so that their products are what G_i shares with them."""
    return [(shrink * scale) ** 0.5 for scale in scales]


def _squared_norms(x: Tensor) -> Tensor:
    """Of the columns, float64 [in]."""
    parts = [x[:, start : start + _COLUMNS].double().square().sum(dim=0) for start in range(0, x.shape[1], _COLUMNS)]
    return torch.cat(parts)


def _stacked(inputs: Sequence[Tensor], roots: Sequence[float], span: slice) -> Tensor:
    return torch.cat([x[:, span].double() * root for x, root in zip(inputs, roots, strict=True)])


def averaged(deltas: Sequence[Tensor], weights: Tensor, *, lambda_: float = 1.0) -> Tensor:
    """The weighted mean, for what is no linear layer's weight."""
    return scaled_sum(deltas, weights, normalize=True, lambda_=lambda_)


def _matched(
    deltas: Sequence[Tensor],
    weights: Tensor,
    inputs: Sequence[Tensor] | None,
    shrink: float,
    terms: Terms,
    lambda_: float,
) -> Tensor:
    if inputs is None:
        return averaged(deltas, weights, lambda_=lambda_)
    return Matching.of(inputs, weights.flatten().tolist(), shrink=shrink, terms=terms).merge(deltas).mul_(lambda_)


@merging_method(combine=averaged, match=Matching.of)
def embedding_matching(
    deltas: Sequence[Tensor],
    weights: Tensor,
    *,
    tokens: Tokens | None = None,
    terms: Terms = "as_read",
    activations: Activations = "specialist",
    shrink: Shrink = 0.9,
    lambda_: Finite = 1.0,
    inputs: Sequence[Tensor] | None = None,
) -> Tensor:
    """Match each specialist's embeddings of its own modality, linear layer by linear layer.

    The delta that minimises sum_i w_i |(D - D_i) X_i^T|^2. X_i are the inputs that the layer has in
    specialist i for the probe, at the positions of i's own modality, and in prompts of its own at those of what follows
    (where there are more than 2,048, at so many of them, evenly spread, which stand for the others; a half of these at
    least are of what follows, if that is long enough). It is RegMean (Jin et al. 2023, arXiv 2212.09849, eq. 2) with
    modality masks.

    Args:
        weights: one number per specialist.
        tokens: at which positions of the probe the engine takes inputs: of the specialist's `own` modality, those and
            what follows the last item (`own_and_after`), or `all` up to the last item. By default `own` where all
            specialists read the same prompts; `own_and_after` where each reads prompts of its own, which `all` takes
            as a whole.
        terms: `as_read`, as above: a modality with more positions counts more; or `equal`, each divided by the trace of
            its X_i^T X_i.
        activations: whose layers hand on what the next layer of a specialist reads: the `specialist`'s own, or the
            `merged` ones (RegMean++, Nguyen et al. 2025, arXiv 2508.03121, section 3), before anything is truncated to
            the rank of an adapter.
        shrink: what off-diagonal elements of each X_i^T X_i are multiplied by; smaller resists noise.
        lambda_: scale of the result.
        inputs: X_i [n_i, in], from the engine; None for a tensor that is no linear layer's weight.
    """
    return _matched(deltas, weights, inputs, shrink, terms, lambda_)


@merging_method(combine=averaged, match=partial(Matching.of, terms="as_read"))
def regmean(
    deltas: Sequence[Tensor],
    weights: Tensor,
    *,
    activations: Activations = "specialist",
    shrink: Shrink = 0.9,
    lambda_: Finite = 1.0,
    inputs: Sequence[Tensor] | None = None,
) -> Tensor:
    """RegMean (Jin et al. 2023, arXiv 2212.09849, eq. 2) on the probe.

    A template for each specialist gives each data of its own, as the paper has it. Where all get the same prompts,
    which are read up to their last item, the first layer reads the same in all of them, and its weights are averaged;
    `embedding_matching` with terms `as_read` takes from such prompts what is each specialist's own.

    Args:
        weights: one number per specialist.
        activations: as of `embedding_matching`; `merged` makes it RegMean++.
        shrink: what off-diagonal elements of each X_i^T X_i are multiplied by (their alpha).
        lambda_: scale of the result.
        inputs: X_i [n_i, in], from the engine; None for a tensor that is no linear layer's weight.
    """
    return _matched(deltas, weights, inputs, shrink, "as_read", lambda_)
