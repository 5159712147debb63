"""Tables for the terminal."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from esmerge.errors import InputError
from esmerge.pipeline import Comparison
from esmerge.results import StoredCoefficients

_BAR_WIDTH = 10


def print_coefficients(coefficients: StoredCoefficients) -> None:
    """Print the layer-wise coefficients [S, L] as a table with one row per layer, larger ones with longer bars."""
    table = Table(title="Layer-wise coefficients (alpha)")
    table.add_column("layer", justify="right")
    for name in coefficients.specialists:
        table.add_column(name)
    if "alpha" not in coefficients.tensors:
        raise InputError("the model has no decoder layers in a list, so there are no layer-wise coefficients to show.")
    alpha = coefficients.tensors["alpha"]
    for number, row in enumerate(alpha.T.tolist()):
        table.add_row(str(number), *(f"{value:6.3f} {_bar(value)}" for value in row))
    table.add_section()
    table.add_row("mean", *(f"{value:6.3f}" for value in alpha.mean(dim=1).tolist()))
    Console().print(table)


def print_comparison(found: Mapping[str, Comparison], specialists: Sequence[str]) -> None:
    """Print what several results differ in, one row each."""
    table = Table(title="Merged deltas", caption="cosine to each specialist's delta, and signs of it opposed")
    table.add_column("result")
    table.add_column("norm", justify="right")
    for name in specialists:
        table.add_column(name, justify="right")
    table.add_column("kept energy", justify="right")
    for name, comparison in found.items():
        pairs = zip(comparison.deltas.cosines, comparison.deltas.sign_conflicts, strict=True)
        energy = "" if comparison.kept_energy is None else f"{comparison.kept_energy:.4f}"
        cells = [f"{cosine:+.3f}  {conflicts:5.1%}" for cosine, conflicts in pairs]
        table.add_row(name, f"{comparison.deltas.norm:.4g}", *cells, energy)
    Console().print(table)


def _bar(value: float) -> str:
    return "█" * round(_BAR_WIDTH * max(0.0, min(1.0, value)))
