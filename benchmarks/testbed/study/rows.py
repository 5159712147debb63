"""The rows of the study's table: every way to merge, and the settings of each that validation data chooses among."""

import itertools
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.testbed.data import MODALITIES
from esmerge.methods import METHODS

Space = Literal["weights", "factors"]
Variant = dict[str, Any]  # the fields `method` and `coefficients` of a recipe

# As many as any method has settings to choose among.
BUDGET = 4
# Settings are chosen with the specialists of one training, and kept for the others.
CHOOSING_SEED = 43
# Of what was corrected when the specialists of that training were gone.
_CHOOSING_SEED_LATER = 42


@dataclass(frozen=True)
class Row:
    """A way to merge.

    Attributes:
        name: of files and folders.
        title: in tables and figures.
        variants: its settings by name, at most `BUDGET`.
        signals: whether coefficients or method come from embedding signals.
        space: in which deltas are merged.
        own_prompts: whether each specialist reads prompts of its own tasks in the probe, instead of one prompt that has
            all modalities.
        chosen_on: with the specialists of which training its settings are validated.
        settled: the setting that is tested, where it had been chosen before what validation data says now.
    """

    name: str
    title: str
    variants: dict[str, Variant]
    signals: bool = False
    space: Space = "weights"
    own_prompts: bool = False
    chosen_on: int = CHOOSING_SEED
    settled: str | None = None

    @property
    def matches(self) -> bool:
        """Whether it is embedding matching."""
        return any(own["method"]["name"] == "embedding_matching" for own in self.variants.values())

    @property
    def probed(self) -> bool:
        """Whether merging needs the probe."""
        return self.signals or any(METHODS[own["method"]["name"]].match for own in self.variants.values())


def _each(number: float) -> dict[str, float]:
    return dict.fromkeys(MODALITIES, number)


def _named(variants: list[Variant]) -> dict[str, Variant]:
    """Variants by what tells them apart, beside the method's name."""
    fields = [
        {**variant["method"], **(variant["coefficients"] if isinstance(variant["coefficients"], dict) else {})}
        for variant in variants
    ]
    named = {}
    for variant, own in zip(variants, fields, strict=True):
        telling = [k for k, v in own.items() if k != "name" and any(other.get(k) != v for other in fields)]
        named["-".join(f"{k}_{own[k]}" for k in telling) or "only"] = variant
    return named


def _summed(name: str, **values: tuple[float | str, ...]) -> dict[str, Variant]:
    """A method with a coefficient of 1 for every specialist."""
    return _named([{"method": {"name": name, **own}, "coefficients": _each(1.0)} for own in _grid_of(**values)])


def _from_signals(granularity: str, scales: tuple[float, ...], settings: list[dict[str, float]]) -> dict[str, Variant]:
    """Coefficients from embedding signals, and what the weighted sum is multiplied by."""
    source = {"from": "embedding_signals", "granularity": granularity}
    methods = [{"name": "linear"} if scale == 1 else {"name": "task_arithmetic", "lambda": scale} for scale in scales]
    return _named([{"method": method, "coefficients": {**source, **own}} for own in settings for method in methods])


def _grid_of(**values: tuple[Any, ...]) -> list[dict[str, Any]]:
    return [dict(zip(values, own, strict=True)) for own in itertools.product(*values.values())]


# As the paper has it: of both granularities, in factors, at the released code's temperatures.
PUBLISHED = "es_both_factors"
PUBLISHED_VARIANT = "temperature_0.5-tau_0.1"

# Embedding matching whose terms are as large as what they were read from.
AS_READ = "embedding_matching_as_read"
# Of prompts like those that each specialist was trained on.
OWN_PROMPTS = "embedding_matching_own_prompts"
# Where layers read what merged layers hand on.
MERGED_LAYERS = "embedding_matching_merged_layers"
# Of whole prompts like those, as RegMean's authors have it.
REGMEAN_OWN_PROMPTS = "regmean_own_prompts"

ROWS: tuple[Row, ...] = (
    Row("uniform", "uniform average", _named([{"method": {"name": "linear"}, "coefficients": "uniform"}])),
    Row(
        "factors",
        "weighted factors",
        {
            f"coefficient_{number}": {"method": {"name": "linear", "normalize": False}, "coefficients": _each(number)}
            for number in (0.33, 0.58, 0.8, 1.0)
        },
        space="factors",
    ),
    Row("task_arithmetic", "task arithmetic", _summed("task_arithmetic", **{"lambda": (0.6, 0.8, 1.0, 1.2)})),
    Row("ties", "TIES", _summed("ties", density=(0.2, 0.5), **{"lambda": (1.0, 1.5)})),
    Row("dare_ties", "DARE-TIES", _summed("dare_ties", density=(0.5, 0.8), **{"lambda": (0.6, 1.0)})),
    Row("pcb", "PCB", _summed("pcb", density=(0.2, 0.5), **{"lambda": (1.0, 1.5)})),
    Row("tsv", "TSV-M", _summed("tsv", **{"lambda": (0.5, 0.75, 1.0, 1.25)})),
    Row("iso_c", "Iso-C", _summed("iso_c", **{"lambda": (0.5, 0.75, 1.0, 1.25)})),
    Row(
        "es_layer_factors",
        "ES layer, factors",
        _from_signals("layer", (1.0,), _grid_of(temperature=(0.25, 0.5, 1.0, 2.0))),
        True,
        "factors",
    ),
    Row(
        "es_element_factors",
        "ES element, factors",
        _from_signals("element", (1.0,), _grid_of(tau=(0.03, 0.1, 0.3, 1.0))),
        True,
        "factors",
    ),
    Row(
        "es_both_factors",
        "ES both, factors",
        _from_signals("both", (1.0,), _grid_of(temperature=(0.5, 2.0), tau=(0.1, 1.0))),
        True,
        "factors",
    ),
    Row("es_layer", "ES layer, weights", _from_signals("layer", (1.0, 2.0), _grid_of(temperature=(0.5, 2.0))), True),
    Row("es_element", "ES element, weights", _from_signals("element", (1.0, 2.0), _grid_of(tau=(0.1, 1.0))), True),
    Row(
        "es_both",
        "ES both, weights",
        _from_signals("both", (1.0, 2.0), [{"temperature": 0.5, "tau": 0.1}, {"temperature": 2.0, "tau": 1.0}]),
        True,
    ),
    Row("regmean", "RegMean", _summed("regmean", shrink=(0.5, 0.9), **{"lambda": (1.0, 1.25)})),
    Row(
        REGMEAN_OWN_PROMPTS,
        "RegMean, own prompts",
        _summed("regmean", shrink=(0.9, 0.98), **{"lambda": (1.0, 1.25)}),
        own_prompts=True,
    ),
    Row(
        "embedding_matching",
        "embedding matching, equal terms",
        _summed("embedding_matching", terms=("equal",), shrink=(0.5, 0.9), **{"lambda": (1.0, 1.25)}),
        True,
    ),
    Row(
        AS_READ,
        "embedding matching, as read",
        _summed("embedding_matching", terms=("as_read",), shrink=(0.5, 0.9), **{"lambda": (1.0, 1.25)}),
        True,
    ),
    Row(
        MERGED_LAYERS,
        "embedding matching, merged layers",
        _summed(
            "embedding_matching",
            terms=("as_read",),
            activations=("merged",),
            shrink=(0.5, 0.9),
            **{"lambda": (1.0, 1.25)},
        ),
        True,
    ),
    Row(
        OWN_PROMPTS,
        "embedding matching, own prompts",
        _summed(
            "embedding_matching",
            tokens=("own_and_after",),
            terms=("as_read",),
            shrink=(0.9, 0.98),
            **{"lambda": (1.0, 1.25)},
        ),
        True,
        own_prompts=True,
        chosen_on=_CHOOSING_SEED_LATER,
        # On validation data with the specialists of training 43, the files of which were lost.
        settled="shrink_0.9-lambda_1.25",
    ),
)

MATCHING = tuple(own.name for own in ROWS if own.matches)
# Coefficients from embedding signals.
FROM_SIGNALS = tuple(own.name for own in ROWS if own.signals and not own.matches)


def _signals(granularity: str, **settings: float | str) -> dict[str, Any]:
    return {"from": "embedding_signals", "granularity": granularity, **settings}


def _doubled(granularity: str, **settings: float | str) -> Variant:
    method = {"name": "task_arithmetic", "lambda": 2.0}
    return {"method": method, "coefficients": _signals(granularity, **settings)}


def _matching(**parameters: Any) -> Variant:
    method = {"name": "embedding_matching", "terms": "equal", "lambda": 1.25, **parameters}
    return {"method": method, "coefficients": _each(1.0)}


def _regmean(**parameters: Any) -> Variant:
    return {"method": {"name": "regmean", "lambda": 1.25, **parameters}, "coefficients": _each(1.0)}


def _matching_own(**parameters: Any) -> Variant:
    return _matching(**{"tokens": "own_and_after", "terms": "as_read", "lambda": 1.0, **parameters})


# What else embedding signals could do, on validation data alone. One of these settings was good enough for a row of its
# own: `MERGED_LAYERS`.
VARIATIONS: tuple[Row, ...] = (
    Row(
        "matching_positions",
        "matching: whose positions",
        {"own modality": _matching(), "all up to the last item": _matching(tokens="all")},
        True,
    ),
    Row(
        "matching_as_read",
        "matching, as read: whose positions, what layers read, shrinking",
        {
            "own modality": _matching(terms="as_read"),
            "own modality and what follows the last item": _matching(terms="as_read", tokens="own_and_after"),
            "merged layers, as in RegMean++": _matching(terms="as_read", activations="merged"),
            "shrinking of 0.98": _matching(terms="as_read", shrink=0.98),
        },
        True,
        chosen_on=_CHOOSING_SEED_LATER,
    ),
    Row(
        "matching_own_prompts",
        "matching, own prompts: whose positions, terms, what layers read",
        {
            "own modality": _matching_own(tokens="own"),
            "own modality and what follows, equal terms": _matching_own(terms="equal"),
            "own modality and what follows, merged layers, as in RegMean++": _matching_own(activations="merged"),
        },
        True,
        own_prompts=True,
        chosen_on=_CHOOSING_SEED_LATER,
    ),
    Row(
        "matching_activations",
        "matching: what layers read comes from",
        {"specialist": _matching(), "merged layers, as in RegMean++": _matching(activations="merged")},
        True,
    ),
    Row(
        "regmean_activations",
        "RegMean: what layers read comes from",
        {
            "specialist": _regmean(),
            "merged layers, as in RegMean++": _regmean(activations="merged"),
        },
    ),
    Row(
        "matching_shrink",
        "matching: shrinking of off-diagonals",
        {f"{shrink}": _matching(shrink=shrink) for shrink in (0.0, 0.5, 0.9, 0.98)},
        True,
    ),
    Row(
        "matching_scale",
        "matching: scale of the result",
        {f"{scale}": _matching(**{"lambda": scale}) for scale in (0.75, 1.0, 1.5, 2.0)},
        True,
    ),
    Row(
        "matching_weights",
        "matching: weights of the terms",
        {
            "equal": _matching(),
            "ES layer, temperature 0.5": {**_matching(), "coefficients": _signals("layer", temperature=0.5)},
            "ES layer, temperature 2": {**_matching(), "coefficients": _signals("layer", temperature=2.0)},
        },
        True,
    ),
    Row(
        "es_alpha",
        "ES layer, weights, lambda 2: alpha, the weight of the other modalities",
        {f"{alpha}": _doubled("layer", alpha=alpha, temperature=2.0) for alpha in (-0.5, 0.0, 0.5, 1.0)},
        True,
    ),
    Row(
        "es_distance",
        "ES element, weights, lambda 2: distance and whose tokens",
        {
            "mse, own": _doubled("element", tau=1.0),
            "frobenius, own": _doubled("element", tau=1.0, distance="frobenius"),
            "frobenius, all": _doubled("element", tau=1.0, distance="frobenius", tokens="all"),
        },
        True,
    ),
    # Their coefficients add up to 1, those of the plain methods to the number of specialists.
    Row(
        "ties_with_signals",
        "TIES, density 0.5: coefficients",
        {
            "equal": {"method": {"name": "ties", "density": 0.5}, "coefficients": _each(1.0)},
            "ES layer": {
                "method": {"name": "ties", "density": 0.5},
                "coefficients": _signals("layer", temperature=2.0),
            },
            "ES both": {"method": {"name": "ties", "density": 0.5}, "coefficients": _signals("both", temperature=2.0)},
        },
        True,
    ),
    Row(
        "tsv_with_signals",
        "TSV-M: coefficients",
        {
            "equal": {"method": {"name": "tsv"}, "coefficients": _each(1.0)},
            "ES layer": {
                "method": {"name": "tsv", "lambda": float(len(MODALITIES))},
                "coefficients": _signals("layer", temperature=2.0),
            },
        },
        True,
    ),
)


def row(name: str) -> Row:
    """The row or variation of a name."""
    return next(own for own in (*ROWS, *VARIATIONS) if own.name == name)
