"""Tables for the terminal."""

from rich.console import Console
from rich.table import Table

from esmerge.results import StoredCoefficients

_BAR_WIDTH = 10


def print_coefficients(coefficients: StoredCoefficients) -> None:
    """Print the layer-wise coefficients [S, L] as a table with one row per layer, larger ones with longer bars."""
    table = Table(title="Layer-wise coefficients (alpha)")
    table.add_column("layer", justify="right")
    for name in coefficients.specialists:
        table.add_column(name)
    alpha = coefficients.tensors["alpha"]
    for number, row in enumerate(alpha.T.tolist()):
        table.add_row(str(number), *(f"{value:6.3f} {_bar(value)}" for value in row))
    table.add_section()
    table.add_row("mean", *(f"{value:6.3f}" for value in alpha.mean(dim=1).tolist()))
    Console().print(table)


def _bar(value: float) -> str:
    return "█" * round(_BAR_WIDTH * max(0.0, min(1.0, value)))
