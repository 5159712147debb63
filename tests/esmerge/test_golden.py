"""The reference values are reproduced, by the functions and by the command line."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from esmerge.backbone import Backbone
from esmerge.coefficients import element_coefficients, layer_coefficients
from esmerge.distances import random_directions
from esmerge.merging import Merger, SignalCoefficients, merge_factors
from esmerge.methods import METHODS
from esmerge.probe import read_tensors
from esmerge.scores import Scratch
from esmerge.signals import ProbedSpecialist, SignalSettings, embedding_signals
from esmerge.specialists import LoraSpecialist

SPECIALISTS = ["molecule", "protein", "cell"]
SETTINGS = {"alpha1.0.temperature0.5": (1.0, 0.5), "alpha0.3.temperature1.0": (0.3, 1.0)}
GRANULARITIES = {"es": "both", "layerwise": "layer", "elementwise": "element"}


def assert_reproduced(actual, expected):
    """Every tensor is there, with an error of at most 1e-5 of the expected one's norm."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].shape == tensor.shape, name
        error = (actual[name].double() - tensor.double()).norm() / tensor.double().norm()
        assert error <= 1e-5, f"{name}: relative error {error:.1e}"


@pytest.fixture(scope="module")
def expected(golden):
    tensors = load_file(golden / "golden.safetensors")

    def below(prefix):
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    return below


@pytest.fixture(scope="module")
def setup(golden):
    return json.loads((golden / "golden.json").read_text())


def probed(specialists):
    def layer_deltas(specialist):
        return lambda number: {
            weight.split(".", 2)[2]: specialist.lora_delta(weight)
            for weight in specialist.modules
            if weight.startswith(f"layers.{number}.")
        }

    return [ProbedSpecialist(specialist.name, layer_deltas(specialist)) for specialist in specialists]


class TestFunctions:
    @pytest.fixture(scope="class")
    def specialists(self, golden):
        return [LoraSpecialist(name, golden / name) for name in SPECIALISTS]

    @pytest.fixture(scope="class")
    def signals(self, golden, setup, specialists):
        backbone = Backbone(golden / "base")
        probe = read_tensors(golden / "golden.safetensors", SPECIALISTS, setup["batch_size"], backbone.hidden_size)
        settings = SignalSettings(
            scores="factors",
            projections=setup["projections"],
            p=setup["p"],
            seed=setup["seed"],
            keep_responses=True,
        )
        with Scratch() as scratch:
            return embedding_signals(backbone, probed(specialists), [probe], settings, scratch, progress=False)

    def test_directions(self, expected, setup):
        directions = random_directions(setup["projections"], 48, setup["seed"])
        assert_reproduced({"": directions}, expected("directions"))

    def test_pooled_embeddings(self, expected, signals):
        pooled = {
            f"{model}.{modality}.{layer}": rows
            for (modality, layer), response in signals.responses.items()
            for model, rows in zip(["base", *SPECIALISTS], response, strict=True)
        }
        assert_reproduced(pooled, expected("pooled."))

    def test_distances_and_their_growth(self, expected, signals):
        assert_reproduced({"": signals.distances}, expected("swd"))
        growth = signals.distances.diff(dim=-1, prepend=torch.zeros(3, 3, 1))
        assert_reproduced({"": growth}, expected("delta_swd"))

    @pytest.mark.parametrize("name", SETTINGS)
    def test_layer_coefficients(self, expected, signals, name):
        coefficients = layer_coefficients(signals.distances, range(3), *SETTINGS[name])
        assert_reproduced({name: coefficients}, {name: expected("layer_coefficients.")[name]})

    def test_scores_and_element_coefficients(self, expected, setup, signals):
        actual, coefficients = {}, {}
        for tensor, scores in signals.scores.items():
            stacked = torch.stack([score.rows(0, score.shape[0]) for score in scores])
            means = torch.tensor([score.mean for score in scores])
            stds = torch.tensor([score.std for score in scores])
            elements = element_coefficients(stacked, means, stds, setup["tau"])
            for index, name in enumerate(SPECIALISTS):
                actual[f"{name}.{tensor}"] = stacked[index]
                coefficients[f"{name}.{tensor}"] = elements[index]
        assert_reproduced(actual, expected("score."))
        assert_reproduced(coefficients, expected("element_coefficient."))

    @pytest.mark.parametrize("name", GRANULARITIES)
    def test_merged_factors(self, expected, setup, signals, specialists, name):
        layer = None if name == "elementwise" else layer_coefficients(signals.distances, range(3))
        scores = None if name == "layerwise" else signals.scores
        coefficients = SignalCoefficients(torch.ones(3) / 3, layer, scores, setup["tau"])
        merger = Merger(coefficients, METHODS["linear"], {"normalize": False}, seed=0)
        merged = {}
        for weight in specialists[0].modules:
            module, number = weight.removesuffix(".weight"), int(weight.split(".")[1])
            deltas = [specialist.lora_delta(weight) for specialist in specialists]
            b, a = merge_factors(merger, module, number, deltas, folded=False, device=torch.device("cpu"))
            merged |= {f"{module}.lora_a.weight": a, f"{module}.lora_b.weight": b}
        assert_reproduced(merged, expected(f"merged.{name}."))


class TestCommandLine:
    @pytest.fixture(scope="class")
    def run(self, golden, setup, run_program, tmp_path_factory):
        """A function that merges with fields overridden and returns the tensors of the files written."""
        folder = tmp_path_factory.mktemp("golden")
        recipe = folder / "recipe.yaml"
        content = {
            "base": str(golden / "base"),
            "specialists": {name: str(golden / name) for name in SPECIALISTS},
            "probe": {"tensors": str(golden / "golden.safetensors"), "batch_size": setup["batch_size"]},
            "coefficients": {
                "from": "embedding_signals",
                "projections": setup["projections"],
                "p": setup["p"],
                "tau": setup["tau"],
            },
            "space": "factors",
            "output": {"signals": True},
            "seed": setup["seed"],
        }
        recipe.write_text(yaml.safe_dump(content, sort_keys=False))

        def run(name, **overrides):
            options = [f"--set={field.replace('__', '.')}={value}" for field, value in overrides.items()]
            run_program("merge", recipe, "-o", folder / name, "--quiet", *options)
            return {file.stem: load_file(file) for file in (folder / name).glob("*.safetensors")}

        return run

    @pytest.fixture(scope="class")
    def merged(self, run):
        return {name: run(name, coefficients__granularity=value) for name, value in GRANULARITIES.items()}

    def test_signals(self, expected, merged):
        names = ("directions", "pooled.", "score.", "element_coefficient.")
        wanted = {prefix + rest: tensor for prefix in names for rest, tensor in expected(prefix).items()}
        assert_reproduced(merged["es"]["signals"], wanted)

    @pytest.mark.parametrize("name", GRANULARITIES)
    def test_merged_adapter(self, expected, merged, name):
        prefix = "base_model.model.model."
        adapter = {
            tensor.removeprefix(prefix).replace("lora_A", "lora_a").replace("lora_B", "lora_b"): values
            for tensor, values in merged[name]["adapter_model"].items()
        }
        assert_reproduced(adapter, expected(f"merged.{name}."))

    def test_distances_and_layer_coefficients(self, expected, merged, run):
        alpha, temperature = SETTINGS["alpha0.3.temperature1.0"]
        other = run("other", coefficients__alpha=alpha, coefficients__temperature=temperature)["coefficients"]
        stored = merged["es"]["coefficients"]
        assert_reproduced({"": stored["distances"]}, expected("swd"))
        found = {"alpha1.0.temperature0.5": stored["alpha"], "alpha0.3.temperature1.0": other["alpha"]}
        assert_reproduced(found, expected("layer_coefficients."))
