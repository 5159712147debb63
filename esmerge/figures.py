"""Figures of a result: coefficient maps, distance curves, embedding maps."""

from pathlib import Path
from typing import TYPE_CHECKING

from esmerge.results import StoredCoefficients

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Where a result has them.
FIGURES_FOLDER = "figures"
# Okabe and Ito's palette, which colour-blind readers can tell apart; the base is grey.
_BASE_COLOR = "#7f7f7f"
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
_MAP_LAYERS = 4


def draw_figures(coefficients: StoredCoefficients, folder: Path) -> list[Path]:
    """Draw what the coefficients hold as PNG files into `folder`.

    Coefficients that come from no embedding signals have no distances and embeddings, so only the first figure.

    Returns:
        The files.
    """
    figures = {"coefficients": coefficient_map(coefficients)}
    if "distances" in coefficients.tensors:
        figures["distances"] = distance_curves(coefficients)
    if "planes" in coefficients.tensors:
        for modality in coefficients.modalities:
            figures[f"embeddings_{modality}"] = embedding_map(coefficients, modality)
    folder.mkdir(exist_ok=True)
    files = []
    for name, figure in figures.items():
        files.append(folder / f"{name}.png")
        figure.savefig(files[-1], dpi=150, bbox_inches="tight", metadata={"Software": None})
    return files


def _figure(columns: int, width: float, height: float) -> "Figure":
    # The object-oriented interface needs no display and leaves the user's pyplot alone.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.subplots(1, columns, squeeze=False)
    return figure


def coefficient_map(coefficients: StoredCoefficients) -> "Figure":
    """Layer-wise coefficients: one row per specialist, one column per layer."""
    alpha = coefficients.tensors["alpha"]
    count, layers = alpha.shape
    figure = _figure(1, max(5.0, 0.3 * layers), 1.2 + 0.5 * count)
    axes = figure.axes[0]
    low, high = min(0.0, float(alpha.min())), max(1.0, float(alpha.max()))
    image = axes.imshow(alpha.numpy(), aspect="auto", cmap="viridis", vmin=low, vmax=high)
    axes.set_yticks(range(count), coefficients.specialists)
    axes.set_xlabel("decoder layer")
    axes.set_title("Layer-wise coefficients")
    figure.colorbar(image, ax=axes, label="alpha")
    return figure


def distance_curves(coefficients: StoredCoefficients) -> "Figure":
    """Distance from the base per layer, on each specialist's own and on the other modalities' tokens.

    As Figure 2 of arXiv 2603.14405.
    """
    distances = coefficients.tensors["distances"]
    figure = _figure(len(coefficients.specialists), 4.0 * len(coefficients.specialists), 3.2)
    for i, (axes, name) in enumerate(zip(figure.axes, coefficients.specialists, strict=True)):
        for t, modality in enumerate(coefficients.modalities):
            own = modality == name
            axes.plot(
                range(distances.shape[-1]),
                distances[i, t].tolist(),
                color=_COLORS[t % len(_COLORS)],
                linestyle="-" if own else "--",
                linewidth=2.2 if own else 1.3,
                label=f"{modality} tokens{' (own)' if own else ''}",
            )
        axes.set_title(f"{name} specialist")
        axes.set_xlabel("decoder layer")
        axes.legend(fontsize=8)
    figure.axes[0].set_ylabel("sliced Wasserstein distance to the base")
    return figure


def embedding_map(coefficients: StoredCoefficients, modality: str) -> "Figure":
    """Embeddings of one modality's tokens in the base and in every specialist, on their principal plane.

    One point per probe input, for a few layers from first to last. As Figure 1 of arXiv 2603.14405.
    """
    planes = coefficients.tensors["planes"][coefficients.modalities.index(modality)]
    layers = planes.shape[1]
    shown = sorted({round(step * (layers - 1) / max(1, _MAP_LAYERS - 1)) for step in range(_MAP_LAYERS)})
    figure = _figure(len(shown), 3.4 * len(shown), 3.4)
    colors = (_BASE_COLOR, *(_COLORS[i % len(_COLORS)] for i in range(len(coefficients.specialists))))
    for axes, number in zip(figure.axes, shown, strict=True):
        for model, name in enumerate(["base", *coefficients.specialists]):
            points = planes[model, number]
            axes.scatter(points[:, 0].tolist(), points[:, 1].tolist(), s=14, alpha=0.7, color=colors[model], label=name)
        axes.set_title(f"layer {number}")
        axes.set_xticks([])
        axes.set_yticks([])
    figure.axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(f"Embeddings of the {modality} tokens")
    return figure
