"""Whole merges: transformers and PEFT load what comes out, and it computes what it should."""

import json
import shutil

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from esmerge.checkpoint import Checkpoint
from esmerge.errors import InputError

NAMES = ["molecule", "protein", "cell"]
INPUTS = torch.arange(40).view(2, 20)


def base_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model):
    return model.eval()(INPUTS).logits


def adapted_logits(base, adapter):
    return logits(PeftModel.from_pretrained(base_model(base), adapter))


def peft_deltas(base, adapter):
    """Each module's dense delta as PEFT itself computes it, by the module's name."""
    model = PeftModel.from_pretrained(base_model(base), adapter)
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def weighted_logits(base, adapters, weights):
    """Logits of the base plus the weighted sum of the adapters' deltas; `weights` is [S, L]."""
    model = base_model(base)
    with torch.no_grad():
        for adapter, weight in zip(adapters, torch.as_tensor(weights), strict=True):
            for name, delta in peft_deltas(base, adapter).items():
                layer = int(name.split("layers.")[1].split(".")[0])
                model.get_submodule(name).weight += weight[layer] * delta
    return logits(model)


def constant(*numbers):
    return torch.tensor(numbers)[:, None].expand(-1, 3)


def files_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def mixed(llama, make_adapter):
    """Adapters of the tiny Llama that differ in everything LoRA allows."""
    settings = {
        "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        "stabilised": {"r": 9, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
        "patterned": {
            "r": 3,
            "lora_alpha": 6,
            "target_modules": ["q_proj", "up_proj", "o_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 7, "up_proj": 2},
            "alpha_pattern": {"up_proj": 16},
        },
        "partial": {"r": 2, "lora_alpha": 4, "target_modules": ["v_proj"], "layers_to_transform": [0, 2]},
    }
    for seed, (name, lora) in enumerate(settings.items(), start=10):
        make_adapter(llama / "base", llama / name, seed, **lora)
    return list(settings)


class TestAdapter:
    @pytest.mark.parametrize(
        ("changes", "weights"),
        [
            ({"coefficients": "uniform"}, constant(1 / 3, 1 / 3, 1 / 3)),
            ({"coefficients": {"molecule": 1, "protein": 2, "cell": 1}}, constant(0.25, 0.5, 0.25)),
            (
                {"coefficients": {"molecule": 0.5, "protein": 0.3, "cell": 1.4}, "method": {"normalize": False}},
                constant(0.5, 0.3, 1.4),
            ),
        ],
        ids=["uniform", "numbers", "numbers as they are"],
    )
    def test_is_the_exact_weighted_sum(self, llama, recipe, merge, changes, weights):
        output = merge(recipe | changes)
        expected = weighted_logits(llama / "base", [llama / name for name in NAMES], weights)
        torch.testing.assert_close(adapted_logits(llama / "base", output), expected, rtol=1e-5, atol=1e-5)

    def test_of_specialists_that_have_nothing_in_common(self, llama, mixed, recipe, merge):
        coefficients = {"plain": 0.4, "stabilised": 0.1, "patterned": 0.3, "partial": 0.2}
        output = merge({"base": "base", "specialists": {name: name for name in mixed}, "coefficients": coefficients})
        expected = weighted_logits(llama / "base", [llama / name for name in mixed], constant(*coefficients.values()))
        torch.testing.assert_close(adapted_logits(llama / "base", output), expected, rtol=1e-5, atol=1e-5)

    def test_of_some_layers_adapts_no_others(self, llama, mixed, merge, make_adapter):
        settings = {"r": 3, "target_modules": ["v_proj"], "layers_to_transform": [2]}
        make_adapter(llama / "base", llama / "last", 40, **settings)
        specialists = {"one": "partial", "two": "last"}
        output = merge({"base": "base", "specialists": specialists, "coefficients": "uniform"})
        adapted = {f"model.layers.{number}.self_attn.v_proj" for number in (0, 2)}
        assert peft_deltas(llama / "base", output).keys() == adapted

    def test_with_layer_coefficients(self, llama, mixed, recipe, merge):
        specialists = dict(zip(NAMES, mixed, strict=False))
        recipe |= {"specialists": specialists}
        recipe["coefficients"]["granularity"] = "layer"
        output = merge(recipe)
        alpha = load_file(output / "coefficients.safetensors")["alpha"]
        assert alpha.std(dim=1).min() > 1e-3, "coefficients that do not vary would test nothing"
        expected = weighted_logits(llama / "base", [llama / name for name in mixed[:3]], alpha)
        torch.testing.assert_close(adapted_logits(llama / "base", output), expected, rtol=1e-5, atol=1e-5)

    def test_of_a_smaller_rank_is_the_best_of_that_rank(self, llama, recipe, merge):
        output = merge(recipe | {"coefficients": "uniform", "output": {"rank": 5}})
        merged = peft_deltas(llama / "base", output)
        deltas = [peft_deltas(llama / "base", llama / name) for name in NAMES]
        energies = []
        for name, delta in merged.items():
            exact = sum(specialist[name] for specialist in deltas) / 3
            s = torch.linalg.svdvals(exact)
            assert torch.linalg.matrix_rank(delta) == 5
            torch.testing.assert_close((exact - delta).norm(), s[5:].norm(), rtol=1e-4, atol=1e-5)
            energies.append(float(s[:5].square().sum() / s.square().sum()))
        reported = yaml.safe_load((output / "esmerge.yaml").read_text())["kept_energy"]
        assert reported["minimum"] == pytest.approx(min(energies), rel=1e-5)
        assert reported["mean"] == pytest.approx(sum(energies) / len(energies), rel=1e-5)

    def test_in_another_dtype(self, recipe, merge):
        output = merge(recipe | {"coefficients": "uniform", "output": {"dtype": "bfloat16"}})
        single = load_file(merge(recipe | {"coefficients": "uniform"}, "float32") / "adapter_model.safetensors")
        for name, tensor in load_file(output / "adapter_model.safetensors").items():
            assert torch.equal(tensor, single[name].bfloat16())

    def test_names_its_base_and_brings_the_tokenizer(self, llama, recipe, merge, tokenizer):
        output = merge(recipe | {"coefficients": "uniform"})
        assert json.loads((output / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
            llama / "base"
        )
        loaded = AutoTokenizer.from_pretrained(output)
        assert loaded.chat_template == tokenizer.chat_template
        assert loaded("CCO MKTAYIAK")["input_ids"] == tokenizer("CCO MKTAYIAK")["input_ids"]

    def test_brings_all_chat_templates(self, llama, recipe, merge, tokenizer, tmp_path):
        shutil.copytree(llama / "base", tmp_path / "base")
        (tmp_path / "base" / "additional_chat_templates").mkdir()
        (tmp_path / "base" / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
        templates = {"default": tokenizer.chat_template, "tools": "{{ tools }}"}
        for kind in ("adapter", "full"):
            content = {**recipe, "base": str(tmp_path / "base"), "coefficients": "uniform", "output": {"format": kind}}
            assert AutoTokenizer.from_pretrained(merge(content, kind)).chat_template == templates


class TestFactors:
    def test_fold_unequal_scalings(self, llama, make_adapter, recipe, merge):
        """A and B are averaged on their own, each B with its adapter's scaling in it."""
        for seed, alpha in ((21, 4), (22, 12)):
            make_adapter(
                llama / "base", llama / f"alpha{alpha}", seed, r=4, lora_alpha=alpha, target_modules=["q_proj"]
            )
        output = merge(
            {
                "base": "base",
                "specialists": {"one": "alpha4", "two": "alpha12"},
                "coefficients": "uniform",
                "space": "factors",
            }
        )
        config = json.loads((output / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (4, 4)
        one, two = (load_file(llama / name / "adapter_model.safetensors") for name in ("alpha4", "alpha12"))
        merged = peft_deltas(llama / "base", output)
        assert len(merged) == 3
        for name, delta in merged.items():
            a, b = (f"base_model.model.{name}.lora_{letter}.weight" for letter in "AB")
            expected = (one[b] * 1.0 + two[b] * 3.0) / 2 @ ((one[a] + two[a]) / 2)
            torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-6)

    def test_keep_a_common_scaling(self, llama, recipe, merge):
        output = merge(recipe | {"space": "factors"})
        config = json.loads((output / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (4, 8)
        full = merge(recipe | {"space": "factors", "output": {"format": "full"}}, "full")
        torch.testing.assert_close(
            adapted_logits(llama / "base", output), logits(base_model(full)), rtol=1e-5, atol=1e-5
        )

    def test_of_unequal_ranks_are_refused(self, mixed, recipe, merge, llama, make_adapter):
        make_adapter(llama / "base", llama / "rank6", 30, r=6, target_modules=["q_proj", "v_proj"])
        recipe |= {"specialists": {"molecule": "plain", "protein": "rank6"}, "space": "factors"}
        recipe["probe"]["template"] = "{molecule} {protein}"
        del recipe["probe"]["data"]["cell"]
        with pytest.raises(InputError, match=r"molecule has rank 4 and protein rank 6 .*space: weights"):
            merge(recipe)


class TestElements:
    @pytest.fixture
    def content(self, recipe, mixed):
        specialists = dict(zip(NAMES, mixed, strict=False))
        return recipe | {"specialists": specialists, "output": {"format": "full", "signals": True}}

    @pytest.mark.parametrize("granularity", ["both", "element"])
    def test_full_weights_and_statistics(self, llama, mixed, content, merge, granularity):
        content["coefficients"]["granularity"] = granularity
        output = merge(content)
        base, merged = (load_file(folder / "model.safetensors") for folder in (llama / "base", output))
        signals = load_file(output / "signals.safetensors")
        stored = load_file(output / "coefficients.safetensors")
        deltas = [peft_deltas(llama / "base", llama / name) for name in mixed[:3]]
        touched = set().union(*deltas)
        assert {name for name in base if not torch.equal(base[name], merged[name])} == {f"{m}.weight" for m in touched}
        for module in touched:
            tensor = module.removeprefix("model.") + ".weight"
            weights = torch.stack([signals[f"element_coefficient.{name}.{tensor}"] for name in NAMES])
            if granularity == "both":
                weights = weights * stored["alpha"][:, int(tensor.split(".")[1])].float().view(3, 1, 1)
                weights = weights / (weights.sum(dim=0) + 1e-12)
            parts = [delta.get(module, torch.zeros(())) for delta in deltas]
            expected = base[f"{module}.weight"] + sum(w * part for w, part in zip(weights, parts, strict=True))
            torch.testing.assert_close(merged[f"{module}.weight"], expected, rtol=1e-5, atol=1e-6)
            std, mean = torch.std_mean(weights.double(), dim=(1, 2), correction=0)
            assert std.min() > 1e-3, "coefficients that do not vary would test nothing"
            torch.testing.assert_close(stored[f"lambda.mean.{tensor}"], mean, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(stored[f"lambda.std.{tensor}"], std, rtol=1e-5, atol=1e-7)

    def test_adapter_of_full_rank_is_the_full_checkpoint(self, llama, content, merge):
        full = merge(content)
        adapter = merge(content | {"output": {"rank": 32}}, "adapter")
        torch.testing.assert_close(
            adapted_logits(llama / "base", adapter), logits(base_model(full)), rtol=1e-4, atol=1e-4
        )


class TestFull:
    @pytest.fixture
    def content(self, recipe):
        return recipe | {"coefficients": "uniform", "output": {"format": "full"}}

    def test_has_the_logits_of_the_adapter_and_every_tensor_of_the_base(self, llama, content, merge):
        full = merge(content)
        adapter = merge(content | {"output": {}}, "adapter")
        torch.testing.assert_close(
            logits(base_model(full)), adapted_logits(llama / "base", adapter), rtol=1e-5, atol=1e-5
        )
        base = load_file(llama / "base" / "model.safetensors")
        assert load_file(full / "model.safetensors").keys() == base.keys()

    def test_keeps_tokenizer_and_generation_config(self, llama, content, merge, tokenizer):
        full = merge(content)
        assert AutoTokenizer.from_pretrained(full)("CCO")["input_ids"] == tokenizer("CCO")["input_ids"]
        assert GenerationConfig.from_pretrained(full) == GenerationConfig.from_pretrained(llama / "base")

    def test_in_another_dtype(self, content, merge):
        single = base_model(merge(content, "single"))
        content["output"]["dtype"] = "bfloat16"
        half = AutoModelForCausalLM.from_pretrained(merge(content))
        assert half.dtype == torch.bfloat16
        for (name, expected), tensor in zip(single.state_dict().items(), half.state_dict().values(), strict=True):
            assert torch.equal(tensor, expected.bfloat16()), name

    def test_keeps_the_dtype_of_the_base(self, llama, tmp_path, recipe, merge):
        """The base's layers run in the dtype of the recipe, whatever they are stored in."""
        base = base_model(llama / "base").bfloat16()
        recipe["probe"]["dtype"] = "float32"
        recipe["output"] = {"format": "full"}
        merged = {}
        for dtype in ("bfloat16", "float32"):
            base.to(getattr(torch, dtype)).save_pretrained(tmp_path / dtype)
            AutoTokenizer.from_pretrained(llama / "base").save_pretrained(tmp_path / dtype)
            folder = merge(recipe | {"base": str(tmp_path / dtype)}, f"merged-{dtype}")
            merged[dtype] = load_file(folder / "model.safetensors")
        for name, tensor in merged["bfloat16"].items():
            assert torch.equal(tensor, merged["float32"][name].bfloat16()), name

    def test_of_a_sharded_base(self, llama, tmp_path, content, merge):
        base_model(llama / "base").save_pretrained(tmp_path / "base", max_shard_size="20KB")
        assert len(list((tmp_path / "base").glob("model-*.safetensors"))) > 2
        expected = load_file(merge(content, "single") / "model.safetensors")
        merged = load_file(merge(content | {"base": str(tmp_path / "base")}) / "model.safetensors")
        assert merged.keys() == expected.keys()
        assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())

    def test_of_tied_embeddings_stores_them_once(self, llama, tmp_path, make_base, content, merge):
        config = base_model(llama / "base").config
        config.tie_word_embeddings = True
        make_base(config, tmp_path / "base")
        full = merge(content | {"base": str(tmp_path / "base")})
        assert "lm_head.weight" not in load_file(full / "model.safetensors")
        expected = weighted_logits(tmp_path / "base", [llama / name for name in NAMES], constant(1 / 3, 1 / 3, 1 / 3))
        torch.testing.assert_close(logits(base_model(full)), expected, rtol=1e-5, atol=1e-5)


class TestRecord:
    def test_tells_what_went_in(self, llama, recipe, merge, esmerge):
        record = yaml.safe_load((merge(recipe) / "esmerge.yaml").read_text())
        inputs = record["inputs"]
        assert inputs.keys() == {"base", "specialists", "probe"}
        hashes = [entry["hash"] for entry in (inputs["base"], *inputs["specialists"].values())]
        hashes += [inputs["probe"][str(llama / f"{name}.txt")] for name in NAMES]
        assert len(set(hashes)) == 7
        assert all(value.startswith("xxh3:") for value in hashes)
        assert record["versions"].keys() >= {"esmerge", "python", "torch", "transformers"}
        assert esmerge("--version")[1] == f"esmerge {record['versions']['esmerge']}\n"
        assert record["tensors"] == {"merged": 7 * 3, "copied": 0, "own rows": 0, "encoders": 0}
        resolved = record["recipe"]
        assert resolved["seed"] == 42
        assert resolved["space"] == "weights"
        assert resolved["probe"]["batch_size"] == 2
        assert resolved["coefficients"] == {
            "from": "embedding_signals",
            "granularity": "both",
            "alpha": 1.0,
            "temperature": 0.5,
            "tau": 0.1,
            "projections": 32,
            "p": 2.0,
            "distance": "mse",
            "tokens": "primary",
            "outside": "mean",
        }

    def test_hash_changes_with_the_content(self, llama, tmp_path, recipe, merge):
        recipe["coefficients"] = "uniform"
        shutil.copytree(llama / "molecule", tmp_path / "molecule")
        outputs = [merge(recipe, "before")]
        recipe["specialists"]["molecule"]["model"] = str(tmp_path / "molecule")
        outputs.append(merge(recipe, "copied"))
        weights = tmp_path / "molecule" / "adapter_model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        outputs.append(merge(recipe, "changed"))
        records = [yaml.safe_load((output / "esmerge.yaml").read_text()) for output in outputs]
        before, copied, changed = (record["inputs"]["specialists"]["molecule"]["hash"] for record in records)
        assert before == copied != changed

    def test_its_recipe_can_be_merged_again(self, recipe, merge):
        first = merge(recipe, "first")
        second = merge(yaml.safe_load((first / "esmerge.yaml").read_text())["recipe"], "second")
        assert files_of(first) == files_of(second)

    def test_order_of_names_is_in_the_metadata(self, recipe, merge):
        recipe["specialists"] = {name: recipe["specialists"][name] for name in ("cell", "molecule", "protein")}
        with Checkpoint.open(merge(recipe), "coefficients") as stored:
            names = {key: json.loads(stored.metadata[key]) for key in ("specialists", "modalities")}
            assert stored.info("alpha").shape == (3, 3)
            assert stored.info("distances").shape == (3, 3, 3)
        assert names == {key: ["cell", "molecule", "protein"] for key in ("specialists", "modalities")}


def test_order_of_specialists_does_not_matter(recipe, merge):
    recipe |= {"space": "factors"}
    forward = load_file(merge(recipe, "forward") / "adapter_model.safetensors")
    recipe["specialists"] = dict(reversed(recipe["specialists"].items()))
    backward = load_file(merge(recipe, "backward") / "adapter_model.safetensors")
    for name, tensor in forward.items():
        torch.testing.assert_close(backward[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("space", ["weights", "factors"])
def test_two_runs_give_the_same_bytes(recipe, merge, space):
    recipe |= {"space": space, "output": {"signals": True}}
    assert files_of(merge(recipe, "first")) == files_of(merge(recipe, "second"))


def test_seed_counts(recipe, merge):
    first, second = (
        load_file(merge(recipe | {"seed": seed}, str(seed)) / "coefficients.safetensors")["distances"]
        for seed in (1, 2)
    )
    assert not torch.equal(first, second)
    torch.testing.assert_close(first, second, rtol=0.5, atol=0)
