"""Merging methods agree with mergekit and PEFT, whole and block by block, and take any coefficients."""

import json
import math

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from esmerge import methods
from esmerge.checkpoint import Checkpoint
from esmerge.deltas import LoraDelta, ShiftDelta
from esmerge.errors import InputError
from esmerge.merging import FixedCoefficients, Merger, SignalCoefficients, TensorStream, merge_dense
from esmerge.methods import METHODS
from esmerge.methods.sparsify import largest_magnitude
from esmerge.pipeline import merge as run_merge
from esmerge.recipe import parse_recipe
from esmerge.scores import dense_score
from esmerge.writing import _own_row

NAMES = ["molecule", "protein", "cell"]
CPU = torch.device("cpu")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def defaults(name, **changes):
    """The keyword parameters of a method, as a recipe that gives `changes` sets them."""
    return METHODS[name].parameters.model_validate(changes).model_dump()


def sparse_parameters(name, density=0.4):
    """Parameters that make a method drop elements, where it can."""
    fields = METHODS[name].parameters.model_fields
    changes = {"density": density, "gamma": 0.05, "epsilon": 0.15, "select_topk": 0.7}
    return {field: value for field, value in changes.items() if field in fields}


def assert_close_to_largest(actual, expected, message=""):
    gap = float((actual - expected).abs().max())
    assert gap <= 1e-5 * float(expected.abs().max()), f"{message}: {gap}"


class TestMergekit:
    """Outputs of mergekit 0.1.5 on full checkpoints."""

    # The un-normalised `linear` of mergekit adds up whole weights, base included, so it is no sum of deltas.
    RECIPES = (
        "linear_normalized",
        "task_arithmetic",
        "task_arithmetic_normalized",
        "ties",
        "ties_normalized",
        "ties_lambda",
        "breadcrumbs",
        "breadcrumbs_ties",
        "slerp",
        "model_stock",
        "sce",
        "karcher",
    )

    @pytest.fixture(scope="class")
    def mergekit(self, golden):
        return golden.parent / "mergekit"

    @pytest.fixture(scope="class")
    def outputs(self, mergekit):
        return load_file(mergekit / "golden.safetensors")

    @pytest.fixture(params=RECIPES)
    def golden_recipe(self, request, mergekit, outputs):
        """Our recipe for one of mergekit's, and what mergekit made of it."""
        theirs = json.loads((mergekit / "golden.json").read_text())[request.param]
        names = [entry["model"] for entry in theirs["models"]]
        own = [dict(entry.get("parameters", {})) for entry in theirs["models"]]
        weights = [parameters.pop("weight", 1.0) for parameters in own]
        assert all(parameters == own[0] for parameters in own)
        recipe = {
            "base": "base",
            "specialists": {name: name for name in names},
            "coefficients": dict(zip(names, weights, strict=True)),
            "method": {"name": theirs["merge_method"], **own[0], **theirs.get("parameters", {})},
            "output": {"format": "full"},
        }
        prefix = f"{request.param}/"
        expected = {name.removeprefix(prefix): t for name, t in outputs.items() if name.startswith(prefix)}
        return recipe, expected

    def test_recipes_are_all_there_are(self, mergekit):
        assert json.loads((mergekit / "golden.json").read_text()).keys() == {"linear", *self.RECIPES}

    def test_function(self, mergekit, golden_recipe):
        recipe, expected = golden_recipe
        base = load_file(mergekit / "base" / "model.safetensors")
        specialists = [load_file(mergekit / name / "model.safetensors") for name in recipe["specialists"]]
        assert expected.keys() == base.keys()
        parameters = dict(recipe["method"])
        method = METHODS[parameters.pop("name")]
        parameters = defaults(method.name, **parameters)
        for name, tensor in base.items():
            given = {"base": tensor} if method.needs_base else {}
            weights = torch.tensor(list(recipe["coefficients"].values())).view(-1, *[1] * tensor.dim())
            merged = method.function([s[name] - tensor for s in specialists], weights, **parameters, **given)
            assert merged.shape == tensor.shape
            assert_close_to_largest(tensor + merged, expected[name], name)

    def test_whole_merge(self, mergekit, golden_recipe, tmp_path):
        recipe, expected = golden_recipe
        run_merge(parse_recipe(recipe, mergekit), tmp_path / "merged", progress=False)
        merged = load_file(tmp_path / "merged" / "model.safetensors")
        assert merged.keys() == expected.keys()
        for name, tensor in expected.items():
            assert_close_to_largest(merged[name], tensor, name)


class TestPeft:
    """`add_weighted_adapter`, which merges A and B apart with the square roots of weight times scaling."""

    DENSITY = 0.6

    @pytest.fixture
    def model(self, llama):
        """The base with the three adapters on it, each by its name."""
        base = AutoModelForCausalLM.from_pretrained(llama / "base", dtype=torch.float32)
        model = PeftModel.from_pretrained(base, llama / NAMES[0], adapter_name=NAMES[0])
        for name in NAMES[1:]:
            model.load_adapter(llama / name, adapter_name=name)
        return model

    @staticmethod
    def modules(model):
        return {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}

    def assert_same(self, model, weights, function, adapter="merged"):
        """`function(factors, weights)` gives PEFT's merged factors, module by module and A before B."""
        modules = self.modules(model)
        assert len(modules) == 21
        for name, module in modules.items():
            roots = [math.sqrt(w * module.scaling[adapter]) for w, adapter in zip(weights, NAMES, strict=True)]
            for factors in (module.lora_A, module.lora_B):
                ours = function([factors[n].weight.detach() for n in NAMES], torch.tensor(roots).view(-1, 1, 1))
                torch.testing.assert_close(ours, factors[adapter].weight.detach(), rtol=1e-5, atol=1e-6, msg=name)

    def test_linear(self, model):
        weights = [0.5, 0.3, 0.9]
        model.add_weighted_adapter(NAMES, weights, "merged", combination_type="linear")
        self.assert_same(model, weights, methods.task_arithmetic)

    def test_magnitude_prune(self, model):
        weights = [0.5, 0.3, 0.9]
        model.add_weighted_adapter(NAMES, weights, "merged", combination_type="magnitude_prune", density=self.DENSITY)
        self.assert_same(model, weights, lambda d, w: methods.magnitude_prune(d, w, density=self.DENSITY))

    def test_ties(self, model):
        """PEFT elects signs without weights and divides by the count, so equal weights make the methods comparable."""
        weights = [0.7, 0.7, 0.7]
        model.add_weighted_adapter(NAMES, weights, "merged", combination_type="ties", density=self.DENSITY)
        self.assert_same(model, weights, lambda d, w: methods.ties(d, w, density=self.DENSITY, lambda_=float(w[0])))

    @staticmethod
    def state_after_initialisation(model, weights, seed):
        """The state of the global generator after PEFT has made, and initialised, a new adapter."""
        torch.manual_seed(seed)
        model.add_weighted_adapter(NAMES, weights, "other", combination_type="linear")
        state = torch.get_rng_state()
        model.delete_adapter("other")
        torch.manual_seed(seed)
        return state

    def test_dare_linear(self, model):
        weights = [0.5, 0.3, 0.9]
        state = self.state_after_initialisation(model, weights, seed=3)
        model.add_weighted_adapter(NAMES, weights, "merged", combination_type="dare_linear", density=self.DENSITY)
        torch.set_rng_state(state)
        self.assert_same(model, weights, lambda d, w: methods.dare_linear(d, w, density=self.DENSITY))

    def test_dare_ties(self, model):
        weights = [0.7, 0.7, 0.7]
        state = self.state_after_initialisation(model, weights, seed=4)
        model.add_weighted_adapter(NAMES, weights, "merged", combination_type="dare_ties", density=self.DENSITY)

        def ours(deltas, w):
            return methods.dare_ties(deltas, w, density=self.DENSITY, normalize=True, lambda_=float(w[0]))

        torch.set_rng_state(state)
        self.assert_same(model, weights, ours)

    @pytest.mark.parametrize("kind", ["ties", "magnitude_prune"])
    def test_svd_of_sparse_deltas(self, model, merge, kind):
        """PEFT's other way: methods on dense deltas, then a truncation."""
        weights = [0.7, 0.7, 0.7]
        model.add_weighted_adapter(
            NAMES, weights, "svd", combination_type=f"{kind}_svd", svd_rank=16, density=self.DENSITY
        )
        method = {"name": kind, "density": self.DENSITY} | ({"lambda": 0.7} if kind == "ties" else {})
        content = {
            "base": "base",
            "specialists": {name: name for name in NAMES},
            "coefficients": dict(zip(NAMES, weights, strict=True)),
            "method": method,
            "output": {"rank": 16},
        }
        model.load_adapter(merge(content), adapter_name="ours")
        for name, module in self.modules(model).items():
            theirs, ours = (module.get_delta_weight(adapter).detach() for adapter in ("svd", "ours"))
            assert float((theirs - ours).norm()) <= 1e-3 * float(theirs.norm()), name

    @pytest.mark.parametrize("rank", [12, 5], ids=["full rank", "truncated"])
    def test_svd_is_no_closer_to_the_exact_sum(self, llama, model, merge, rank):
        weights = [0.5, 0.3, 0.9]
        model.add_weighted_adapter(NAMES, weights, "svd", combination_type="svd", svd_rank=rank)
        content = {
            "base": "base",
            "specialists": {name: name for name in NAMES},
            "coefficients": dict(zip(NAMES, weights, strict=True)),
            "method": "task_arithmetic",
            "output": {"rank": rank},
        }
        model.load_adapter(merge(content), adapter_name="ours")
        for name, module in self.modules(model).items():
            exact = sum(
                weight
                * module.scaling[n]
                * (module.lora_B[n].weight.detach().double() @ module.lora_A[n].weight.detach().double())
                for n, weight in zip(NAMES, weights, strict=True)
            )
            errors = {}
            for adapter in ("svd", "ours"):
                assert module.lora_A[adapter].weight.shape[0] == rank
                errors[adapter] = float((module.get_delta_weight(adapter).detach().double() - exact).norm())
            # Single precision on top: both are at the optimum.
            assert errors["ours"] <= errors["svd"] + 1e-6 * float(exact.norm()), (name, errors)


class TestBlocks:
    """The engine gives a method blocks of rows; the result is that of the whole tensors."""

    @pytest.fixture(params=[(37, 22), (37,)], ids=["matrix", "vector"])
    def tensors(self, request, tmp_path):
        """The base's tensor in a checkpoint, and three deltas of it, of which one is none."""
        shape = request.param
        save_file({"layers.0.x": random(*shape, seed=9)}, tmp_path / "model.safetensors")
        deltas = [random(*shape, seed=1), random(*shape, seed=2) * 2, torch.zeros(shape), random(*shape, seed=3) + 0.3]
        return Checkpoint.open(tmp_path), deltas

    @staticmethod
    def merged(name, tensors, coefficients, seed=5):
        checkpoint, deltas = tensors
        if METHODS[name].specialists == 2:
            deltas = deltas[:2]
        parameters = defaults(name, **sparse_parameters(name))
        merger = Merger(coefficients(len(deltas)), METHODS[name], parameters, seed)
        given = [ShiftDelta(delta) if delta.any() else None for delta in deltas]
        stream = TensorStream(checkpoint, "layers.0.x", tuple(deltas[0].shape), given, CPU)
        return merge_dense(merger, "layers.0.x", 0, stream), merger, deltas

    @staticmethod
    def scalar(count):
        numbers = torch.tensor([0.5, 0.3, 0.4, 0.8], dtype=torch.float64)[:count]
        return FixedCoefficients(lambda name: numbers)

    @staticmethod
    def element_wise(shape):
        def make(count):
            scores = [dense_score(random(*shape, seed=20 + index).abs()) for index in range(count)]
            layer = torch.tensor([[0.4], [0.1], [0.2], [0.3]], dtype=torch.float64)[:count]
            return SignalCoefficients(layer[:, 0], layer, {"layers.0.x": scores}, tau=1.0)

        return make

    @pytest.fixture
    def small_blocks(self, monkeypatch):
        def shrink():
            monkeypatch.setattr("esmerge.scores.BLOCK_ELEMENTS", 100)
            monkeypatch.setattr("esmerge.methods.sparse.CACHE_ELEMENTS", 60)
            monkeypatch.setattr("esmerge.methods.sparsify.CACHE_ELEMENTS", 60)

        return shrink

    @pytest.mark.parametrize("coefficients", ["scalar", "element-wise"])
    @pytest.mark.parametrize("name", METHODS)
    def test_do_not_show(self, name, coefficients, tensors, small_blocks):
        shape = tuple(tensors[1][0].shape)
        make = self.scalar if coefficients == "scalar" else self.element_wise(shape)
        whole, _, _ = self.merged(name, tensors, make)
        small_blocks()
        blocks, _, _ = self.merged(name, tensors, make)
        assert whole.shape == shape
        assert whole.isfinite().all()
        assert whole.any()
        torch.testing.assert_close(blocks, whole, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("coefficients", ["scalar", "element-wise"])
    @pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.random])
    def test_give_what_the_function_gives(self, name, coefficients, tensors, small_blocks):
        shape = tuple(tensors[1][0].shape)
        small_blocks()
        blocks, merger, deltas = self.merged(
            name, tensors, self.scalar if coefficients == "scalar" else self.element_wise(shape)
        )
        if coefficients == "scalar":
            weights = merger.coefficients.scalars("layers.0.x", 0).float().view(-1, *[1] * len(shape))
        else:
            weights = merger.coefficients.rows("layers.0.x", 0)(0, shape[0])
            assert weights.shape == (len(deltas), *shape)
        given = {"base": tensors[0].read("layers.0.x")} if METHODS[name].needs_base else {}
        whole = METHODS[name].function(deltas, weights, **defaults(name, **sparse_parameters(name)), **given)
        torch.testing.assert_close(blocks, whole, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.random])
    def test_draw_one_stream(self, name):
        """A function goes on with its generator from delta to delta; so do its parts, block by block."""
        deltas, weights = [random(12, 30, seed=seed) for seed in (1, 2)], torch.tensor([0.4, 0.6]).view(2, 1, 1)
        method, parameters = METHODS[name], sparse_parameters(name)
        generator = torch.Generator().manual_seed(6)
        whole = method.function(deltas, weights, **parameters, generator=generator)
        generator, sparse = torch.Generator().manual_seed(6), []
        for delta in deltas:
            blocks = delta.split(5)
            sparsify = method.sparsify(lambda blocks=blocks: blocks, delta.numel(), **parameters, generator=generator)
            sparse.append(torch.cat([sparsify(block) for block in blocks]))
        combined = {key: defaults(name)[key] for key in ("normalize", "lambda_")}
        torch.testing.assert_close(method.combine(sparse, weights, **combined), whole)

    @pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.random])
    def test_seed_counts(self, name, tensors):
        first, again, other = (self.merged(name, tensors, self.scalar, seed)[0] for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


class TestSparsifiers:
    def test_dare_keeps_the_share_and_the_mean(self):
        kept = methods.dare_linear(
            [torch.ones(400, 400)], torch.ones(1, 1, 1), density=0.3, generator=torch.Generator().manual_seed(1)
        )
        assert kept.unique().tolist() == [0.0, pytest.approx(1 / 0.3)]
        assert float((kept != 0).float().mean()) == pytest.approx(0.3, abs=0.005)
        assert float(kept.mean()) == pytest.approx(1, abs=0.02)

    def test_della_keeps_large_elements_more_often(self):
        delta = torch.arange(1.0, 101).expand(4000, 100) * torch.tensor([1.0, -1.0]).repeat(50)
        kept = methods.della_linear(
            [delta], torch.ones(1, 1, 1), density=0.5, epsilon=0.2, generator=torch.Generator().manual_seed(1)
        )
        share = (kept != 0).float().mean(dim=0)
        expected = torch.linspace(0.3, 0.7, 100)
        torch.testing.assert_close(share, expected, rtol=0, atol=0.04)
        torch.testing.assert_close(kept.mean(dim=0), delta[0], rtol=0.12, atol=0)

    @pytest.mark.parametrize("density", [0.1, 0.5, 0.99])
    def test_largest_are_kept(self, density):
        delta = random(30, 40)
        kept = methods.magnitude_prune([delta], torch.ones(1, 1, 1), density=density)
        count = int(density * delta.numel())
        smallest = delta.abs().flatten().sort(descending=True).values[count - 1]
        assert torch.equal(kept, torch.where(delta.abs() >= smallest, delta, 0))
        assert int(kept.count_nonzero()) == count

    def test_breadcrumbs_leave_out_both_ends(self):
        delta = torch.arange(1.0, 101)[torch.randperm(100, generator=torch.Generator().manual_seed(0))].view(10, 10)
        kept = methods.breadcrumbs([delta], torch.ones(1, 1, 1), density=0.7, gamma=0.1)
        assert sorted(kept[kept != 0].tolist()) == list(range(21, 91))


def share_weights(count, *shape):
    return torch.full((count, *[1] * len(shape)), 1 / count)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (12, 12)], ids=str)
class TestSpectral:
    def test_tsv_of_one_specialist_is_its_delta(self, shape):
        delta = random(*shape)
        torch.testing.assert_close(methods.tsv([delta], torch.ones(1, 1, 1)), delta, rtol=1e-4, atol=1e-5)

    def test_tsv_keeps_the_tasks_apart(self, shape):
        """Only with orthonormal vectors are the singular values of the result those that were kept of the tasks."""
        deltas, weights = [random(*shape, seed=seed) for seed in range(3)], torch.tensor([0.5, 0.3, 0.4])
        merged = methods.tsv(deltas, weights.view(3, 1, 1))
        kept = min(shape) // 3
        values = torch.cat([w * torch.linalg.svdvals(d)[:kept] for w, d in zip(weights, deltas, strict=True)])
        found = torch.linalg.svdvals(merged)
        torch.testing.assert_close(found[: 3 * kept], values.sort(descending=True).values, rtol=1e-4, atol=1e-5)
        assert float(found[3 * kept :].sum()) < 1e-4

    def test_iso_c_has_equal_singular_values(self, shape):
        deltas = [random(*shape, seed=seed) for seed in range(3)]
        merged = methods.iso_c(deltas, torch.ones(3, 1, 1), lambda_=0.5)
        values = torch.linalg.svdvals(sum(deltas))
        expected = values.mean().mul(0.5).expand(min(shape))
        torch.testing.assert_close(torch.linalg.svdvals(merged), expected, rtol=1e-4, atol=1e-5)
        u, _, vt = torch.linalg.svd(sum(deltas), full_matrices=False)
        torch.testing.assert_close(merged, u @ vt * expected[0], rtol=1e-4, atol=1e-4)

    def test_iso_c_adds_no_direction_that_the_sum_has_not(self, shape):
        delta = random(shape[0], 2) @ random(2, shape[1], seed=1)
        values = torch.linalg.svdvals(methods.iso_c([delta, delta], share_weights(2, *shape)))
        torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=0)
        assert float(values[2:].max()) < 1e-5 * float(values[0])


@pytest.mark.parametrize("method", [methods.tsv, methods.iso_c])
def test_spectral_methods_take_experts_one_by_one(method):
    deltas, weights = [random(4, 30, 20, seed=seed) for seed in range(3)], torch.tensor([0.5, 0.3, 0.4])
    alone = [method([delta[expert] for delta in deltas], weights.view(3, 1, 1)) for expert in range(4)]
    assert torch.equal(method(deltas, weights.view(3, 1, 1, 1)), torch.stack(alone))
    # Kernels of depthwise convolutions have no other direction than their own.
    deltas = [random(20, 1, 3, seed=seed) for seed in range(3)]
    average = sum(delta / 3 for delta in deltas)
    torch.testing.assert_close(method(deltas, share_weights(3, 20, 1, 3)), average)


@pytest.mark.parametrize("rank", [2, 40])
def test_spectral_methods_on_deltas_of_low_rank_are_those_of_their_nonzero_triplets(rank):
    """Vectors of zero singular values are arbitrary: kept, they would turn those of the other tasks."""
    deltas = [random(280, rank, seed=seed) @ random(rank, 260, seed=seed + 9) for seed in range(3)]
    parts = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
    u = torch.cat([u[:, :rank] for u, _, _ in parts], dim=1)
    vt = torch.cat([vt[:rank] for _, _, vt in parts])
    nearest = []
    for matrix in (u, vt):
        p, _, q = torch.linalg.svd(matrix, full_matrices=False)
        nearest.append(p @ q)
    values = torch.cat([s[:rank] for _, s, _ in parts])
    expected = (nearest[0] * values) @ nearest[1]
    merged = methods.tsv(deltas, torch.ones(3, 1, 1))
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert torch.equal(methods.tsv(deltas, torch.ones(3, 1, 1)), merged)
    left, s, right = torch.linalg.svd(sum(deltas), full_matrices=False)
    expected = left[:, : 3 * rank] @ right[: 3 * rank] * s[: 3 * rank].mean()
    torch.testing.assert_close(methods.iso_c(deltas, torch.ones(3, 1, 1)), expected, rtol=1e-4, atol=1e-4)


def test_spectral_methods_of_zero_deltas_are_zero():
    zeros = [torch.zeros(80, 70)] * 2
    for method in (methods.tsv, methods.iso_c):
        assert torch.equal(method(zeros, torch.ones(2, 1, 1)), torch.zeros(80, 70))


def test_pcb_takes_bfloat16():
    deltas = [delta.bfloat16() for delta in torch.randn(3, 40, 30, generator=torch.Generator().manual_seed(0))]
    merged = methods.pcb(deltas, torch.ones(3, 1, 1), density=0.3)
    assert merged.isfinite().all() and merged.any()


def plain_pcb(deltas, density):
    """Parameter competition balancing, line by line as its authors' code has it."""

    def normalize(x):
        low, high = x.min(dim=1, keepdim=True).values, x.max(dim=1, keepdim=True).values
        return (x - low) / (high - low)

    def clamp(x, min_ratio, max_ratio):
        size = x.shape[1]
        ordered = x.sort(dim=1).values
        low = ordered[:, int(size * min_ratio)].unsqueeze(1)
        high = ordered[:, int(size * (1 - max_ratio) - 1)].unsqueeze(1)
        return torch.clamp(x, low, high)

    flat = torch.stack([delta.flatten() for delta in deltas])
    magnitudes = clamp(flat.abs(), 0.0001, 0.0001)
    clamped = flat.sign() * magnitudes
    intra = torch.exp(len(deltas) * normalize(magnitudes) ** 2)
    inter = torch.tanh(flat * flat.sum(dim=0))
    scale = normalize(clamp(intra * inter, 1 - density, 0))
    merged = (clamped * scale).sum(dim=0) / scale.sum(dim=0).clamp(min=1e-12)
    return merged.view(deltas[0].shape)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_pcb_is_the_authors_procedure(density):
    deltas = [random(150, 100, seed=seed) * 0.02 for seed in range(3)]
    merged = methods.pcb(deltas, share_weights(3, 150, 100), density=density, lambda_=1.3)
    expected = plain_pcb(deltas, density) * 1.3
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-7)


class TestIdenticalSpecialists:
    @pytest.fixture
    def delta(self):
        return random(18, 24)

    def merged(self, name, delta):
        count = METHODS[name].specialists or 3
        given = {"base": random(*delta.shape, seed=7)} if METHODS[name].needs_base else {}
        changes = {"density": 1.0} if "density" in METHODS[name].parameters.model_fields else {}
        weights = share_weights(count, *delta.shape)
        return METHODS[name].function([delta.clone()] * count, weights, **defaults(name, **changes), **given)

    @pytest.mark.parametrize("name", [name for name in METHODS if name not in ("pcb", "tsv", "iso_c")])
    def test_give_their_delta(self, name, delta):
        torch.testing.assert_close(self.merged(name, delta), delta, rtol=1e-4, atol=1e-5)

    def test_pcb_clips_the_outermost_elements_alone(self, delta):
        merged = self.merged("pcb", delta)
        differing = (merged - delta).abs() > 1e-5
        ends = {int(delta.abs().argmin()), int(delta.abs().argmax())}
        assert set(differing.flatten().nonzero().flatten().tolist()) == ends

    @pytest.mark.parametrize("name", ["tsv", "iso_c"])
    def test_keep_their_direction(self, name, delta):
        merged = self.merged(name, delta)
        assert float((merged * delta).sum() / merged.norm() / delta.norm()) > 0.4


def test_model_stock_shortens_what_does_not_agree():
    """Orthogonal deltas say nothing about the way to go; identical ones all."""
    one, two = torch.zeros(4, 4), torch.zeros(4, 4)
    one[0], two[1] = 1, 1
    assert not methods.model_stock([one, two], share_weights(2, 4, 4)).any()
    third = (one + two) / math.sqrt(2)
    merged = methods.model_stock([one, third], share_weights(2, 4, 4))
    cosine = 1 / math.sqrt(2)
    torch.testing.assert_close(merged, 2 * cosine / (1 + cosine) * (one + third) / 2)


class TestEmbeddingSignals:
    """Every method takes coefficients from embedding signals."""

    @pytest.fixture
    def content(self, recipe):
        def make(name, output, coefficients=None):
            if METHODS[name].specialists == 2:
                recipe["specialists"].pop("cell", None)
                recipe["probe"]["data"].pop("cell", None)
                recipe["probe"]["template"] = "Molecule: {molecule}\nProtein: {protein}"
            changes = {} if coefficients is None else {"coefficients": coefficients}
            if coefficients is None and METHODS[name].match is not None:
                changes["coefficients"] = {**recipe["coefficients"], "granularity": "layer"}
            return {**recipe, "method": {"name": name, **sparse_parameters(name)}, "output": output, **changes}

        return make

    @pytest.mark.parametrize("name", METHODS)
    def test_in_full_weights_and_in_an_adapter(self, name, llama, content, merge):
        full = merge(content(name, {"format": "full"}), "full")
        adapter = merge(content(name, {"rank": 32}), "adapter")
        uniform = merge(content(name, {"format": "full"}, "uniform"), "uniform")
        base, merged, other = (load_file(folder / "model.safetensors") for folder in (llama / "base", full, uniform))
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama / "base"), adapter)
        modules = {n: m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}
        assert len(modules) == 21
        for module_name, module in modules.items():
            stored = module_name.removeprefix("base_model.model.") + ".weight"
            delta = merged[stored] - base[stored]
            size = float(delta.abs().max())
            assert delta.isfinite().all()
            assert float((merged[stored] - other[stored]).abs().max()) > 1e-3 * size > 0, "the coefficients count"
            dense = module.get_delta_weight("default").detach()
            torch.testing.assert_close(dense, delta, rtol=1e-3, atol=1e-4 * size, msg=stored)


@pytest.mark.parametrize("name", METHODS)
def test_layers_with_coefficients_of_zero_stay_the_base(name, llama, recipe, merge):
    names = NAMES[: METHODS[name].specialists]
    content = {
        "base": "base",
        "specialists": {specialist: specialist for specialist in names},
        "coefficients": {specialist: {"layers.0.*": 0, "*": 0.5} for specialist in names},
        "probe": recipe["probe"],
        "method": name,
        "output": {"format": "full"},
    }
    base, merged = (load_file(f / "model.safetensors") for f in (llama / "base", merge(content)))
    for tensor in merged:
        projection = "layers.0." not in tensor and "_proj" in tensor
        assert torch.equal(merged[tensor], base[tensor]) is not projection, tensor


@pytest.mark.parametrize("name", ["della", "della_linear"])
@pytest.mark.parametrize("density", [0.1, 0.9])
def test_della_with_impossible_probabilities_is_refused(name, density, recipe, merge):
    method = {"name": name, "density": density}
    with pytest.raises(InputError, match=r"density .* epsilon"):
        merge(recipe | {"coefficients": "uniform", "method": method, "output": {"format": "full"}})


def test_rows_of_own_tokens_are_made_where_the_base_is():
    """On the device without memory, which mixes with no other."""
    elsewhere = torch.device("meta")
    delta = LoraDelta(torch.ones(2, 4), torch.ones(8, 2), 1.0)
    stream = TensorStream(None, "embed_tokens.weight", (8, 4), [delta], elsewhere)
    assert _own_row(stream, delta, 5).device == elsewhere


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.combine is None])
def test_methods_on_whole_tensors_make_nothing_of_deltas_that_are_zero(name):
    """And are not asked to: memory for whole tensors is taken where something changed only."""
    count = 2 if name == "slerp" else 3
    merger = Merger(FixedCoefficients(lambda _: torch.ones(count, dtype=torch.float64)), METHODS[name], {}, 0)
    still = TensorStream(None, "", (600, 500), [ShiftDelta(torch.zeros(600, 500))] * count, CPU)
    assert merger.memory("layers.0.x", still) == 0
    moved = torch.zeros(600, 500)
    moved[599, 499] = 1
    deltas = [ShiftDelta(torch.zeros(600, 500))] * (count - 1) + [ShiftDelta(moved)]
    assert merger.memory("layers.0.x", TensorStream(None, "", (600, 500), deltas, CPU)) > 4 * count * moved.numel()
    assert not merge_dense(merger, "layers.0.x", 0, still).any()
    assert merger.statistics["layers.0.x"].mean.tolist() == [1] * count


@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.999, 1.0])
def test_thresholds_of_deltas_that_are_mostly_zero(zeros):
    """As those of full checkpoints in half precision are, and of embeddings that nobody trained."""
    random = torch.Generator().manual_seed(0)
    delta = torch.randn(1200, 500, generator=random)
    delta[torch.rand(delta.shape, generator=random) < zeros] = 0
    ordered = delta.abs().flatten().sort(descending=True).values
    made = []

    def blocks():
        made.append(1)
        return iter(delta.split(300))

    for rank in (1, 2, 500, 599, 601, 300_000, 599_999, 600_000):
        made.clear()
        found = largest_magnitude(blocks, rank)
        assert found.dtype == torch.float32 and found == ordered[rank - 1]
        # Once to see what there is, once for a sample, and mostly once to count.
        assert len(made) <= 4
