"""Specialists of every kind: a merge with one of them alone is that specialist, as PEFT and transformers run it."""

import json
import shutil

import pytest
import torch
import transformers
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GemmaConfig, LlamaConfig, Qwen2Config

from esmerge.errors import InputError

NAMES = ["molecule", "protein", "cell"]
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
INPUTS = torch.arange(40).view(2, 20)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model):
    return model.eval()(INPUTS).logits


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def assert_logits(folder, expected):
    """transformers loads the result without complaint, and it computes what it should."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


def train(base, folder, seed, **settings):
    """Saves an adapter of `base` with PEFT, every trained value moved at random."""
    torch.manual_seed(seed)
    config = LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "lora_dropout": 0.0} | settings)
    model = get_peft_model(load(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def perturb(base, folder, seed, scale=0.05):
    """Saves a full checkpoint: the base with every tensor moved at random."""
    model = load(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(llama, make_base, tmp_path_factory):
    """Folders of a Llama, a Llama with tied embeddings, and a Qwen2, whose attention has biases."""
    folder = tmp_path_factory.mktemp("bases")
    settings = AutoConfig.from_pretrained(llama / "base").to_dict()
    settings = {key: settings[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    make_base(LlamaConfig(**settings, tie_word_embeddings=True), folder / "tied", seed=1)
    make_base(Qwen2Config(**settings, tie_word_embeddings=False), folder / "qwen2", seed=2)
    return {"llama": llama / "base", "tied": folder / "tied", "qwen2": folder / "qwen2"}


@pytest.fixture
def alone(merge, tmp_path):
    """A function that merges a specialist with coefficient 1 and another with 0, into full weights."""

    def run(base, specialist, other, name="merged", **changes):
        content = {
            "base": str(base),
            "specialists": {"one": str(specialist), "other": str(other)},
            "coefficients": {"one": 1.0, "other": 0.0},
            "output": {"format": "full"},
        }
        return merge(content | changes, name)

    return run


PATTERNS = {
    "rank_pattern": {r"layers\.1\.self_attn\.(q|k)_proj": 7, "up_proj": 2, "^model.layers.0.mlp.down_proj": 3},
    "alpha_pattern": {"self_attn.q_proj": 11, "layers.2.mlp.up_proj": 1},
}
ADAPTERS = {
    "patterns of ranks and alphas": ("llama", {"target_modules": ALL_LINEAR, **PATTERNS}),
    "patterns, rank-stabilised": ("llama", {"target_modules": ALL_LINEAR, **PATTERNS, "use_rslora": True}),
    "some layers": ("llama", {"target_modules": ALL_LINEAR, "layers_to_transform": [0, 2], "layers_pattern": "layers"}),
    "without some modules": ("llama", {"target_modules": "all-linear", "exclude_modules": ["layers.1.mlp.up_proj"]}),
    "orthogonal start": ("llama", {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": "orthogonal"}),
    "random start": ("llama", {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}),
    "embeddings by LoRA, rank-stabilised": ("llama", {"target_modules": ["embed_tokens"], "use_rslora": True}),
    "dora": ("llama", {"use_dora": True, "target_modules": ALL_LINEAR}),
    "dora, rank-stabilised": ("llama", {"use_dora": True, "use_rslora": True, "target_modules": ["q_proj", "o_proj"]}),
    "head saved": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "embeddings saved": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "embeddings saved, tied if the base ties them": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "norms saved": (
        "llama",
        {"target_modules": ["v_proj"], "modules_to_save": ["input_layernorm", "post_attention_layernorm", "norm"]},
    ),
    "linear layer saved": ("llama", {"target_modules": ["v_proj"], "modules_to_save": ["up_proj"]}),
    "embeddings and head by LoRA": ("llama", {"target_modules": ["embed_tokens", "lm_head", "k_proj"]}),
    "trained tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7, 31]}),
    "trained tokens by module": (
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [30, 2]}},
    ),
    "all biases": ("qwen2", {"target_modules": ALL_LINEAR, "bias": "all"}),
    "biases of adapted layers": ("qwen2", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "biases of B": ("qwen2", {"target_modules": ["q_proj", "k_proj"], "lora_bias": True}),
    "biases and biases of B": ("qwen2", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True, "bias": "all"}),
    "dora with biases": ("qwen2", {"target_modules": ["q_proj", "down_proj"], "use_dora": True, "bias": "all"}),
}


class TestAdapters:
    @pytest.mark.parametrize(("kind", "settings"), ADAPTERS.values(), ids=ADAPTERS)
    def test_alone_are_what_peft_merges(self, bases, alone, tmp_path, kind, settings):
        base = bases[kind]
        adapter = train(base, tmp_path / "adapter", seed=1, **settings)
        other = train(base, tmp_path / "other", seed=2, target_modules=["q_proj", "up_proj"])
        expected = logits(PeftModel.from_pretrained(load(base), adapter).merge_and_unload())
        assert float((expected - logits(load(base))).abs().max()) > 0.01
        assert_logits(alone(base, adapter, other), expected)

    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize(
        "tokens",
        [[64, 65, 66, 67], {"model.embed_tokens": [64, 65]}, {"embed_tokens": [64, 65], "lm_head": [66]}],
        ids=["both", "by path", "other ones at each end"],
    )
    def test_tokens_trained_on_a_resized_vocabulary(self, make_base, alone, tmp_path, tied, tokens):
        settings = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        settings |= {"num_attention_heads": 4, "tie_word_embeddings": tied}
        base = make_base(LlamaConfig(**settings), tmp_path / "base")
        model = load(base)
        model.resize_token_embeddings(68, mean_resizing=False)
        config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], trainable_token_indices=tokens)
        model = get_peft_model(model, config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.1)
        model.save_pretrained(tmp_path / "resized")
        other = train(base, tmp_path / "other", seed=2, target_modules=["q_proj"])
        inputs = torch.arange(28, 68).view(2, 20)
        with torch.no_grad():
            expected = model.eval()(inputs).logits
            found = load(alone(base, tmp_path / "resized", other))(inputs).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    def test_converted_from_a_start_that_moved_the_base(self, bases, alone, tmp_path):
        """PEFT saves PiSSA as an adapter of the unmoved base if it is asked to; as it stands it is refused."""
        base = bases["llama"]
        config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "up_proj"], init_lora_weights="pissa")
        model = get_peft_model(load(base), config)
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / "start")
        model.peft_config["default"].init_lora_weights = "pissa"
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
        expected = logits(model)
        other = train(base, tmp_path / "other", seed=2, target_modules=["q_proj"])
        model.save_pretrained(tmp_path / "pissa")
        with pytest.raises(InputError, match=r"init_lora_weights is 'pissa'; PiSSA changes the base's weights"):
            alone(base, tmp_path / "pissa", other)
        model.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
        assert_logits(alone(base, tmp_path / "lora", other), expected)

    @pytest.mark.parametrize(
        ("settings", "untied"),
        [
            ({"modules_to_save": ["embed_tokens"]}, True),
            ({"modules_to_save": ["lm_head"]}, True),
            ({"target_modules": ["q_proj", "embed_tokens"]}, True),
            ({"target_modules": ["q_proj", "lm_head"]}, True),
            ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, False),
            ({"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, False),
            ({"trainable_token_indices": [3, 7]}, False),
            ({"trainable_token_indices": [3, 7], "target_modules": ["q_proj", "lm_head"]}, True),
            ({"trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [4]}}, True),
            ({}, False),
        ],
        ids=[
            "saved embeddings",
            "saved head",
            "embeddings by LoRA",
            "head by LoRA",
            "saved embeddings kept tied",
            "embeddings by LoRA kept tied",
            "trained tokens",
            "trained tokens under a head by LoRA",
            "other trained tokens at each end",
            "neither",
        ],
    )
    def test_of_tied_embeddings(self, bases, alone, tmp_path, settings, untied):
        """Embeddings come apart only where an adapter changes one end and not the other."""
        base = bases["tied"]
        adapter = train(base, tmp_path / "adapter", seed=3, **{"target_modules": ["q_proj"]} | settings)
        other = train(base, tmp_path / "other", seed=2, target_modules=["q_proj"])
        expected = logits(PeftModel.from_pretrained(load(base), adapter))
        merged = alone(base, adapter, other)
        assert_logits(merged, expected)
        assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is not untied
        assert ("lm_head.weight" in weights_of(merged)) is untied


class TestFullCheckpoints:
    @pytest.mark.parametrize("kind", ["llama", "tied", "qwen2"])
    def test_alone_are_themselves(self, bases, alone, tmp_path, kind):
        one, other = (perturb(bases[kind], tmp_path / str(seed), seed) for seed in (1, 2))
        merged = weights_of(alone(bases[kind], one, other))
        expected = weights_of(one)
        assert merged.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6)

    def test_tied_stay_tied(self, bases, alone, tmp_path):
        one, other = (perturb(bases["tied"], tmp_path / str(seed), seed) for seed in (1, 2))
        merged = alone(bases["tied"], one, other)
        assert "lm_head.weight" not in weights_of(merged)
        assert_logits(merged, logits(load(one)))
        model = load(merged)
        assert model.lm_head.weight is model.model.embed_tokens.weight

    def test_that_untied_their_embeddings(self, bases, alone, tmp_path, make_base):
        """One specialist has output embeddings of its own, the other follows its input embeddings."""
        config = AutoConfig.from_pretrained(bases["tied"])
        config.tie_word_embeddings = False
        one = make_base(config, tmp_path / "one", seed=5)
        other = perturb(bases["tied"], tmp_path / "other", 2)
        halves = {"coefficients": {"one": 0.5, "other": 0.5}}
        merged = weights_of(alone(bases["tied"], one, other, **halves))
        first, second = weights_of(one), weights_of(other)
        second["lm_head.weight"] = second["model.embed_tokens.weight"]
        assert merged.keys() == first.keys()
        for name, tensor in merged.items():
            torch.testing.assert_close(tensor, (first[name] + second[name]) / 2, rtol=1e-5, atol=1e-6, msg=name)

    def test_that_tied_their_embeddings(self, bases, alone, tmp_path):
        """The base has output embeddings of its own, one specialist has not."""
        base = bases["llama"]
        config = AutoConfig.from_pretrained(base)
        config.tie_word_embeddings = True
        torch.manual_seed(5)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "one")
        one, other = tmp_path / "one", perturb(base, tmp_path / "other", 2)
        assert "lm_head.weight" not in weights_of(one)
        halves = {"coefficients": {"one": 0.5, "other": 0.5}}
        output = alone(base, one, other, **halves)
        first, second = weights_of(one), weights_of(other)
        first["lm_head.weight"] = first["model.embed_tokens.weight"]
        for name, tensor in weights_of(output).items():
            torch.testing.assert_close(tensor, (first[name] + second[name]) / 2, rtol=1e-5, atol=1e-6, msg=name)
        assert not AutoConfig.from_pretrained(output).tie_word_embeddings

    @pytest.fixture
    def twice(self, tmp_path):
        """A function that copies a checkpoint with tied embeddings, both ends stored."""

        def store(folder, name, change=0.0):
            shutil.copytree(folder, tmp_path / name)
            tensors = weights_of(folder)
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + change
            save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
            return tmp_path / name

        return store

    @pytest.mark.parametrize("who", ["base", "specialist", "both"])
    @pytest.mark.parametrize("explicit", [True, False], ids=["config says so", "by default"])
    def test_tied_embeddings_that_are_stored_twice(self, bases, alone, tmp_path, twice, make_base, who, explicit):
        base, one, other = bases["tied"], *(perturb(bases["tied"], tmp_path / str(n), n) for n in (1, 2))
        if not explicit:
            # Gemma ties its embeddings unless its config says otherwise.
            settings = AutoConfig.from_pretrained(base).to_dict()
            settings = {key: settings[key] for key in ("vocab_size", "hidden_size", "intermediate_size")}
            settings |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
            base = make_base(GemmaConfig(**settings), tmp_path / "gemma")
            one, other = (perturb(base, tmp_path / f"gemma-{n}", n) for n in (1, 2))
            for folder in (base, one, other):
                config = json.loads((folder / "config.json").read_text())
                config.pop("tie_word_embeddings", None)
                (folder / "config.json").write_text(json.dumps(config))
        expected = alone(base, one, other, "expected")
        doubled = [twice(base, "base2") if who != "specialist" else base, twice(one, "one2") if who != "base" else one]
        output = alone(*doubled, other)
        assert weights_of(output).keys() == weights_of(expected).keys()
        assert (output / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
        assert_logits(output, logits(load(one)))
        left_out = yaml.safe_load((output / "esmerge.yaml").read_text())["left_out"]
        assert left_out.keys() == {"base": {"base"}, "specialist": {"one"}, "both": {"base", "one"}}[who]

    def test_embeddings_that_only_the_config_ties(self, bases, alone, tmp_path, twice):
        """transformers does not tie what differs; the result says so."""
        base = twice(bases["tied"], "apart", 0.1)
        one, other = (twice(perturb(bases["tied"], tmp_path / str(n), n), f"apart-{n}", 0.1 * n) for n in (1, 2))
        output = alone(base, one, other)
        assert weights_of(output).keys() == weights_of(one).keys()
        for name, tensor in weights_of(one).items():
            torch.testing.assert_close(weights_of(output)[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
        assert AutoConfig.from_pretrained(output).tie_word_embeddings is False
        assert_logits(output, logits(load(one)))

    @pytest.mark.parametrize("kept_tied", [True, False])
    def test_adapter_of_a_base_whose_tied_embeddings_are_stored_twice(self, bases, alone, tmp_path, twice, kept_tied):
        base = twice(bases["tied"], "base2")
        settings = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": kept_tied}
        adapter = train(bases["tied"], tmp_path / "adapter", seed=3, **settings)
        other = train(bases["tied"], tmp_path / "other", seed=2, target_modules=["q_proj"])
        output = alone(base, adapter, other)
        assert_logits(output, logits(PeftModel.from_pretrained(load(bases["tied"]), adapter)))
        assert ("lm_head.weight" in weights_of(output)) is not kept_tied

    def test_in_shards_and_in_half_precision(self, bases, alone, tmp_path):
        one, other = (perturb(bases["llama"], tmp_path / str(seed), seed) for seed in (1, 2))
        load(one).bfloat16().save_pretrained(tmp_path / "shards", max_shard_size="10KB")
        assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 3
        merged = weights_of(alone(bases["llama"], tmp_path / "shards", other))
        for name, tensor in weights_of(one).items():
            torch.testing.assert_close(merged[name], tensor.bfloat16().float(), rtol=1e-5, atol=1e-6, msg=name)

    def test_of_another_architecture_are_refused(self, bases, alone, tmp_path):
        with pytest.raises(InputError, match="other is Qwen2, the base is Llama"):
            alone(bases["llama"], perturb(bases["llama"], tmp_path / "one", 1), bases["qwen2"])

    def test_of_another_size_are_refused(self, bases, alone, make_base, tmp_path):
        config = AutoConfig.from_pretrained(bases["llama"])
        config.num_hidden_layers = 2
        make_base(config, tmp_path / "shallow")
        with pytest.raises(InputError, match="other has num_hidden_layers 2, the base 3"):
            alone(bases["llama"], perturb(bases["llama"], tmp_path / "one", 1), tmp_path / "shallow")


@pytest.fixture
def plain(bases, tmp_path):
    """A LoRA adapter of the Llama, and the full checkpoint that it makes of it."""
    adapter = train(bases["llama"], tmp_path / "plain", seed=4, target_modules=ALL_LINEAR)
    model = PeftModel.from_pretrained(load(bases["llama"]), adapter).merge_and_unload()
    model.save_pretrained(tmp_path / "folded")
    return adapter, tmp_path / "folded"


def test_all_kinds_in_one_merge(bases, plain, merge, tmp_path):
    base = bases["llama"]
    dora = train(base, tmp_path / "dora", seed=5, use_dora=True, target_modules=ALL_LINEAR, modules_to_save=["norm"])
    full = perturb(base, tmp_path / "full", seed=6)
    numbers = {"molecule": 0.5, "protein": 0.3, "cell": 0.9}
    content = {
        "base": str(base),
        "specialists": {"molecule": str(plain[0]), "protein": str(dora), "cell": str(full)},
        "coefficients": numbers,
        "method": "task_arithmetic",
        "output": {"format": "full"},
    }
    merged = weights_of(merge(content))
    start = weights_of(base)
    folded = PeftModel.from_pretrained(load(base), dora).merge_and_unload().state_dict()
    for name, tensor in start.items():
        own = (weights_of(plain[1])[name], folded[name], weights_of(full)[name])
        expected = tensor + sum(w * (t - tensor) for w, t in zip(numbers.values(), own, strict=True))
        torch.testing.assert_close(merged[name], expected, rtol=1e-5, atol=1e-6, msg=name)


class TestSignals:
    """Embedding signals do not depend on how a specialist is stored."""

    @pytest.fixture
    def content(self, llama, recipe):
        return recipe | {"output": {"format": "full", "signals": True}}

    def test_of_an_adapter_and_of_the_checkpoint_it_makes(self, llama, plain, content, merge):
        results = []
        for specialist in plain:
            content["specialists"]["molecule"] = {"model": str(specialist)}
            folder = merge(content, f"of-{specialist.name}")
            results.append([load_file(folder / f"{s}.safetensors") for s in ("coefficients", "signals", "model")])
        (adapter, adapter_signals, adapter_weights), (full, full_signals, full_weights) = results
        for name in ("alpha", "distances"):
            torch.testing.assert_close(full[name], adapter[name], rtol=1e-5, atol=1e-6)
        for name, tensor in adapter_signals.items():
            if name.startswith("element_coefficient."):
                torch.testing.assert_close(full_signals[name], tensor, rtol=1e-3, atol=1e-3, msg=name)
        assert adapter_weights.keys() == full_weights.keys()
        for name, tensor in adapter_weights.items():
            torch.testing.assert_close(full_weights[name], tensor, rtol=1e-4, atol=1e-5, msg=name)

    @pytest.mark.parametrize("kind", ["dora", "norms saved"])
    def test_of_an_adapter_that_is_no_plain_one(self, llama, content, merge, tmp_path, kind):
        """The probe runs the very model that PEFT merges."""
        adapter = train(llama / "base", tmp_path / "adapter", seed=7, **ADAPTERS[kind][1])
        PeftModel.from_pretrained(load(llama / "base"), adapter).merge_and_unload().save_pretrained(tmp_path / "full")
        found = []
        for specialist in ("adapter", "full"):
            content["specialists"]["molecule"] = {"model": str(tmp_path / specialist)}
            found.append(load_file(merge(content, f"of-{specialist}") / "coefficients.safetensors"))
        torch.testing.assert_close(found[0]["distances"], found[1]["distances"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found[0]["alpha"], found[1]["alpha"], rtol=1e-4, atol=1e-5)

    def test_score_norms_and_biases_element_by_element(self, bases, merge, tmp_path):
        """Against one plain backward pass per batch through a layer of the specialist's own model."""
        base = bases["qwen2"]
        hidden, count, positions = 32, 3, 6
        generator = torch.Generator().manual_seed(0)
        masks = torch.zeros(2, count, positions, dtype=torch.bool)
        masks[0, :, 1:3] = masks[1, :, 3:5] = True
        embeds = torch.randn(count, positions, hidden, generator=generator)
        probe = {"inputs_embeds": embeds, "attention_mask": torch.ones(count, positions, dtype=torch.int64)}
        save_file({**probe, "mask.one": masks[0].clone(), "mask.two": masks[1].clone()}, tmp_path / "probe.safetensors")
        folders = {"one": perturb(base, tmp_path / "one", 1), "two": perturb(base, tmp_path / "two", 2)}
        content = {
            "base": str(base),
            "specialists": {name: str(folder) for name, folder in folders.items()},
            "probe": {"tensors": str(tmp_path / "probe.safetensors"), "batch_size": 1},
            "coefficients": {"from": "embedding_signals", "projections": 8},
            "output": {"format": "full", "signals": True},
        }
        merged = merge(content)
        signals = load_file(merged / "signals.safetensors")
        coefficients = load_file(merged / "coefficients.safetensors")
        parameters = ["self_attn.q_proj.bias", "input_layernorm.weight", "self_attn.v_proj.bias", "mlp.up_proj.weight"]
        for index, (name, folder) in enumerate(folders.items()):
            for layer in range(3):
                expected = plain_scores(load(base), load(folder), embeds, masks[index], layer)
                for parameter in parameters:
                    score = signals[f"score.{name}.layers.{layer}.{parameter}"]
                    assert score.any()
                    gap = (score - expected[parameter]).abs().max() / expected[parameter].abs().max()
                    assert float(gap) < 1e-4, (name, layer, parameter)
        start, weights = weights_of(base), weights_of(merged)
        for layer in range(3):
            for parameter in parameters:
                tensor = f"layers.{layer}.{parameter}"
                own = [signals[f"element_coefficient.{name}.{tensor}"] for name in folders]
                products = torch.stack(
                    [a * b for a, b in zip(coefficients["alpha"][:, layer].float(), own, strict=True)]
                )
                shares = products / products.sum(dim=0)
                deltas = [
                    weights_of(folder)[f"model.{tensor}"] - start[f"model.{tensor}"] for folder in folders.values()
                ]
                expected = start[f"model.{tensor}"] + sum(s * d for s, d in zip(shares, deltas, strict=True))
                assert float(shares[0].std()) > 1e-3
                torch.testing.assert_close(weights[f"model.{tensor}"], expected, rtol=1e-4, atol=1e-6, msg=tensor)


def plain_scores(base, specialist, embeds, mask, layer):
    """Sum over batches of one of |d distance / d parameter|, for the parameters of one layer, by plain autograd."""
    module = specialist.model.layers[layer]
    totals = {name: torch.zeros_like(parameter) for name, parameter in module.named_parameters()}
    detach = module.register_forward_pre_hook(
        lambda _, args, kwargs: ((args[0].detach(), *args[1:]), kwargs), with_kwargs=True
    )
    for row, positions in zip(embeds, mask, strict=True):
        states = []
        for model in (base, specialist):
            output = model(inputs_embeds=row[None], output_hidden_states=True)
            # The last of them is after the final norm, as the method wants it.
            states.append(output.hidden_states[layer + 1][0][positions])
        distance = (states[1] - states[0].detach()).square().mean()
        gradients = torch.autograd.grad(distance, list(module.parameters()))
        for total, gradient in zip(totals.values(), gradients, strict=True):
            total += gradient.abs()
    detach.remove()
    return totals


class TestOutsideTheLayers:
    OUTSIDE = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")

    @pytest.fixture
    def full(self, llama, recipe, tmp_path):
        """A recipe of three full specialists, and the tensors of base and specialists."""
        folders = [perturb(llama / "base", tmp_path / name, seed) for seed, name in enumerate(NAMES)]
        recipe["specialists"] = {name: str(folder) for name, folder in zip(NAMES, folders, strict=True)}
        recipe["output"] = {"format": "full"}
        recipe["coefficients"]["granularity"] = "layer"
        return recipe, weights_of(llama / "base"), [weights_of(folder) for folder in folders]

    def assert_weighed(self, merged, base, specialists, numbers):
        for name in self.OUTSIDE:
            deltas = [weights[name] - base[name] for weights in specialists]
            expected = base[name] + sum(float(n) * d for n, d in zip(numbers, deltas, strict=True))
            torch.testing.assert_close(merged[name], expected, rtol=1e-5, atol=1e-6, msg=name)

    def test_coefficients_are_the_mean_of_alpha(self, full, merge):
        recipe, base, specialists = full
        output = merge(recipe)
        alpha = load_file(output / "coefficients.safetensors")["alpha"]
        assert float(alpha.mean(dim=1).std()) > 1e-3
        self.assert_weighed(weights_of(output), base, specialists, alpha.mean(dim=1))

    @pytest.mark.parametrize(
        ("outside", "numbers"),
        [("uniform", [1 / 3] * 3), ({"molecule": 0.2, "protein": 0.7, "cell": 0.1}, [0.2, 0.7, 0.1])],
        ids=["uniform", "numbers"],
    )
    def test_coefficients_can_be_set(self, full, merge, outside, numbers):
        recipe, base, specialists = full
        recipe["coefficients"]["outside"] = outside
        self.assert_weighed(weights_of(merge(recipe)), base, specialists, numbers)

    def test_patterns_give_each_tensor_its_number(self, full, merge):
        recipe, base, specialists = full
        recipe["coefficients"] = {
            "molecule": {"layers.0.*": 1.0, "*.mlp.*": 0.5, "*": 0.25},
            "protein": 0.5,
            "cell": {"lm_head.*": 0.0, "*": 2.0},
        }
        recipe["method"] = {"name": "linear", "normalize": False}
        merged = weights_of(merge(recipe))
        expected = {
            "model.layers.0.mlp.up_proj.weight": (1.0, 0.5, 2.0),
            "model.layers.1.mlp.up_proj.weight": (0.5, 0.5, 2.0),
            "model.layers.1.self_attn.q_proj.weight": (0.25, 0.5, 2.0),
            "lm_head.weight": (0.25, 0.5, 0.0),
        }
        for name, numbers in expected.items():
            deltas = [weights[name] - base[name] for weights in specialists]
            wanted = base[name] + sum(n * d for n, d in zip(numbers, deltas, strict=True))
            torch.testing.assert_close(merged[name], wanted, rtol=1e-5, atol=1e-6, msg=name)

    def test_patterns_must_match_every_tensor(self, full, merge):
        recipe, _, _ = full
        recipe["coefficients"] = {"molecule": {"layers.*": 1.0}, "protein": 1.0, "cell": 1.0}
        with pytest.raises(InputError, match=r"coefficients\.molecule: no pattern matches .*end with the pattern '\*'"):
            merge(recipe)


class TestTokens:
    """Specialists with tokens that the base does not have."""

    EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")

    @pytest.fixture
    def base(self, llama):
        return llama / "base"

    @pytest.fixture
    def size(self, tokenizer):
        return len(tokenizer)

    @pytest.fixture
    def specialist(self, base, tmp_path):
        """A function that makes a full specialist with tokens of its own."""

        def make(name, tokens, seed, multiple=None):
            tokenizer = AutoTokenizer.from_pretrained(base)
            tokenizer.add_tokens(tokens, special_tokens=True)
            perturb(base, tmp_path / name, seed)
            model = load(tmp_path / name)
            torch.manual_seed(seed)
            model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=multiple, mean_resizing=False)
            with torch.no_grad():
                for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
                    embedding.weight += torch.randn_like(embedding.weight) * 0.05
            model.save_pretrained(tmp_path / name)
            tokenizer.save_pretrained(tmp_path / name)
            return tmp_path / name

        return make

    @pytest.fixture
    def merged(self, base, merge):
        """A function that merges specialists into full weights with equal coefficients."""

        def run(*folders, at=base, name="merged"):
            content = {
                "base": str(at),
                "specialists": {f"s{number}": str(folder) for number, folder in enumerate(folders)},
                "coefficients": "uniform",
                "output": {"format": "full"},
            }
            return merge(content, name)

        return run

    def assert_rows(self, merged, base, specialists, size, owned):
        """Common rows are averages; each row of `owned` is that of the specialist with that index, bit by bit."""
        result, start = weights_of(merged), weights_of(base)
        own = [weights_of(folder) for folder in specialists]
        for name in self.EMBEDDINGS:
            expected = start[name][:size] + sum(w[name][:size] - start[name][:size] for w in own) / len(own)
            torch.testing.assert_close(result[name][:size], expected, rtol=1e-5, atol=1e-6)
            for row, index in owned.items():
                assert torch.equal(result[name][row], own[index][name][row]), (name, row)

    def assert_tokens(self, merged, base, ids):
        """The tokenizer of the result knows all tokens under their ids, and everything else as before."""
        tokenizer, before = AutoTokenizer.from_pretrained(merged), AutoTokenizer.from_pretrained(base)
        for token, token_id in ids.items():
            assert tokenizer.convert_tokens_to_ids(token) == token_id
            assert tokenizer.decode([token_id]) == token
            assert (
                tokenizer(f"CCO{token}CCO")["input_ids"]
                == [*before("CCO")["input_ids"], token_id] + before("CCO")["input_ids"]
            )
        assert len(tokenizer) == len(before) + len(ids)
        assert tokenizer.chat_template == before.chat_template

    def test_of_one_specialist(self, base, size, specialist, merged):
        one, other = specialist("one", ["<mol>"], 1), specialist("other", [], 2)
        output = merged(one, other)
        assert AutoConfig.from_pretrained(output).vocab_size == size + 1
        assert load(output).get_input_embeddings().num_embeddings == size + 1
        self.assert_rows(output, base, [one, other], size, {size: 0})
        self.assert_tokens(output, base, {"<mol>": size})

    def test_of_two_specialists(self, base, size, specialist, merged):
        """One token in common, which is averaged, and one that only the second has."""
        one, other = specialist("one", ["<mol>"], 1), specialist("other", ["<mol>", "<prot>"], 2)
        output = merged(one, other)
        assert AutoConfig.from_pretrained(output).vocab_size == size + 2
        self.assert_rows(output, base, [one, other], size, {size + 1: 1})
        self.assert_tokens(output, base, {"<mol>": size, "<prot>": size + 1})
        for name in self.EMBEDDINGS:
            mean = (weights_of(one)[name][size] + weights_of(other)[name][size]) / 2
            torch.testing.assert_close(weights_of(output)[name][size], mean)

    def test_of_two_specialists_at_different_ids(self, base, size, specialist, merged):
        """The second left a free id, which is the first's; its unused row there does not count."""
        one, other = specialist("one", ["<mol>"], 1), specialist("other", ["<unused>", "<prot>"], 2)
        content = json.loads((other / "tokenizer.json").read_text())
        content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["content"] != "<unused>"]
        (other / "tokenizer.json").write_text(json.dumps(content))
        output = merged(one, other)
        self.assert_rows(output, base, [one, other], size, {size: 0, size + 1: 1})
        self.assert_tokens(output, base, {"<mol>": size, "<prot>": size + 1})

    def test_in_a_padded_vocabulary(self, base, size, specialist, merged):
        """Rows that pad a specialist's vocabulary are nobody's token: they leave those of the others alone."""
        one, other = specialist("one", ["<mol>"], 1, multiple=48), specialist("other", [], 2, multiple=48)
        padded = -(-(size + 1) // 48) * 48
        assert weights_of(one)["lm_head.weight"].shape[0] == padded
        output = merged(one, other)
        assert AutoConfig.from_pretrained(output).vocab_size == padded
        assert load(output).get_input_embeddings().num_embeddings == padded
        self.assert_rows(output, base, [one, other], size, {size: 0})
        self.assert_tokens(output, base, {"<mol>": size})

    def test_in_the_padding_of_the_base(self, base, size, specialist, merged, tmp_path):
        """The base has rows to spare; one specialist has a token in one of them."""
        start = specialist("start", [], 3, multiple=48)
        rows = weights_of(start)["lm_head.weight"].shape[0]
        one, other = specialist("one", ["<mol>"], 1, multiple=48), specialist("other", [], 2, multiple=48)
        output = merged(one, other, at=start)
        assert AutoConfig.from_pretrained(output).vocab_size == rows
        self.assert_rows(output, start, [one, other], size, {size: 0})
        self.assert_tokens(output, base, {"<mol>": size})

    def test_of_a_specialist_with_fewer_rows_than_the_base(self, base, size, specialist, merged):
        """Resizing to the tokenizer cuts the base's padding off; what is left of it stays as it was."""
        start = specialist("start", [], 3, multiple=48)
        rows = weights_of(start)["lm_head.weight"].shape[0]
        one, other = specialist("one", ["<mol>"], 1), specialist("other", [], 2)
        assert weights_of(one)["lm_head.weight"].shape[0] < rows
        output = merged(one, other, at=start)
        assert AutoConfig.from_pretrained(output).vocab_size == rows
        self.assert_rows(output, start, [one, other], size, {size: 0})
        self.assert_tokens(output, base, {"<mol>": size})
        for name in self.EMBEDDINGS:
            assert torch.equal(weights_of(output)[name][size + 1 :], weights_of(start)[name][size + 1 :])

    def test_that_stand_for_the_same_id(self, size, specialist, merged):
        one, other = specialist("one", ["<mol>"], 1), specialist("other", ["<prot>"], 2)
        with pytest.raises(InputError, match=rf"token {size} is '<mol>' in s0 and '<prot>' in s1"):
            merged(one, other)

    def test_with_two_ids(self, size, specialist, merged):
        one, other = specialist("one", ["<mol>"], 1), specialist("other", ["<prot>", "<mol>"], 2)
        content = json.loads((other / "tokenizer.json").read_text())
        content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["content"] != "<prot>"]
        (other / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match=rf"token '<mol>' has the id {size} in s0 and {size + 1} in s1"):
            merged(one, other)

    def test_that_leave_a_gap(self, size, specialist, merged):
        """A tokenizer would give the token after the gap the id before it."""
        one, other = specialist("one", [], 1), specialist("other", ["<unused>", "<prot>"], 2)
        content = json.loads((other / "tokenizer.json").read_text())
        content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["content"] != "<unused>"]
        (other / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match=rf"no token {size}, but '<prot>' \({size + 1}\) of s1 after it"):
            merged(one, other)

    def test_beside_a_base_whose_tokenizer_is_an_old_one(self, base, size, specialist, merged, tmp_path):
        """Its tokens are known, so that conflicts are found, but none can be added."""
        shutil.copytree(base, tmp_path / "old")
        vocabulary = AutoTokenizer.from_pretrained(base).get_vocab()
        (tmp_path / "old" / "tokenizer.json").unlink()
        (tmp_path / "old" / "vocab.json").write_text(json.dumps(vocabulary))
        one, other = specialist("one", ["<mol>"], 1), specialist("other", [], 2)
        with pytest.raises(InputError, match=r"has no tokenizer\.json, which the specialists' own tokens are added to"):
            merged(one, other, at=tmp_path / "old")
        vocabulary["<other>"] = vocabulary.pop("<|user|>")
        (tmp_path / "old" / "vocab.json").write_text(json.dumps(vocabulary))
        with pytest.raises(InputError, match=r"is '<other>' in the base and '<\|user\|>' in s0"):
            merged(one, other, at=tmp_path / "old")

    @pytest.mark.parametrize("output", [{"format": "full"}, {}], ids=["full", "adapter"])
    def test_of_an_adapter_that_uses_the_padding_of_the_base(
        self, base, size, specialist, merge, tmp_path, output, caplog
    ):
        """Its embeddings are as the base has them; only the tokenizer says what they stand for."""
        start = specialist("start", [], 3, multiple=48)
        rows = weights_of(start)["lm_head.weight"].shape[0]
        assert rows >= size + 1
        adapters = [train(start, tmp_path / str(seed), seed, target_modules=["q_proj"]) for seed in (1, 2)]
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.add_tokens(["<mol>"], special_tokens=True)
        tokenizer.save_pretrained(adapters[0])
        content = {
            "base": str(start),
            "specialists": {f"s{number}": str(folder) for number, folder in enumerate(adapters)},
            "coefficients": "uniform",
            "output": output,
        }
        merged = merge(content)
        self.assert_tokens(merged, base, {"<mol>": size})
        assert not caplog.records
        if output:
            assert torch.equal(weights_of(merged)["lm_head.weight"], weights_of(start)["lm_head.weight"])

    def test_of_an_adapter_without_embeddings_for_them(self, base, size, merge, tmp_path, caplog):
        adapters = [train(base, tmp_path / str(seed), seed, target_modules=["q_proj"]) for seed in (1, 2)]
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.add_tokens(["<mol>"], special_tokens=True)
        tokenizer.save_pretrained(adapters[0])
        content = {
            "base": str(base),
            "specialists": {f"s{number}": str(folder) for number, folder in enumerate(adapters)},
            "coefficients": "uniform",
        }
        self.assert_tokens(merge(content), base, {})
        sentences = [record.getMessage() for record in caplog.records]
        assert sentences == [f"s0 has the token '<mol>' ({size}), but no embedding for it: it is left out"]

    @pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
    @pytest.mark.parametrize(
        "settings",
        [{"modules_to_save": ["embed_tokens", "lm_head"]}, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}],
        ids=["saved", "by LoRA"],
    )
    def test_of_an_adapter(self, base, size, merged, tmp_path, settings, shards):
        """PEFT saves resized embeddings whole, beside their factors if they have some."""
        shutil.copytree(base, tmp_path / "base")
        if shards:
            (tmp_path / "base" / "model.safetensors").unlink()
            load(base).save_pretrained(tmp_path / "base", max_shard_size="10KB")
        shutil.copytree(base, tmp_path / "resized")
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.add_tokens(["<mol>"], special_tokens=True)
        model = load(base)
        torch.manual_seed(0)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        model.save_pretrained(tmp_path / "resized")
        adapter = train(tmp_path / "resized", tmp_path / "adapter", 1, **{"target_modules": ["q_proj"]} | settings)
        tokenizer.save_pretrained(adapter)
        other = train(base, tmp_path / "other", 2, target_modules=["v_proj"])
        output = merged(adapter, other, at=tmp_path / "base")
        self.assert_tokens(output, base, {"<mol>": size})
        expected = PeftModel.from_pretrained(load(tmp_path / "resized"), adapter).merge_and_unload().state_dict()
        for name in self.EMBEDDINGS:
            own = weights_of(output)[name]
            assert own.shape[0] == size + 1
            torch.testing.assert_close(own[size], expected[name][size], rtol=1e-5, atol=1e-6)
            start = weights_of(base)[name]
            half = (start + expected[name][:size]) / 2
            torch.testing.assert_close(own[:size], half, rtol=1e-5, atol=1e-6)


TIED = {
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}, "query_key_value", "word_embeddings"),
    "falcon": (
        "FalconConfig",
        {"num_hidden_layers": 2, "num_attention_heads": 4},
        "query_key_value",
        "word_embeddings",
    ),
    "biogpt": ("BioGptConfig", {"num_hidden_layers": 2, "num_attention_heads": 4}, "q_proj", "embed_tokens"),
    "mamba": ("MambaConfig", {"num_hidden_layers": 2}, "in_proj", "embeddings"),
}


@pytest.mark.parametrize("kind", TIED)
@pytest.mark.parametrize("how", ["LoRA", "saved"])
def test_embeddings_of_any_name_that_an_adapter_takes_from_their_head(make_base, alone, tmp_path, kind, how):
    """PEFT changes the input embeddings alone, though the base's output embeddings are tied to them."""
    name, settings, module, embeddings = TIED[kind]
    config = getattr(transformers, name)(vocab_size=64, hidden_size=32, tie_word_embeddings=True, **settings)
    base = make_base(config, tmp_path / "base")
    changed = {"target_modules": [module, embeddings]} if how == "LoRA" else {"modules_to_save": [embeddings]}
    adapter = train(base, tmp_path / "adapter", seed=1, **{"target_modules": [module]} | changed)
    other = train(base, tmp_path / "other", seed=2, target_modules=[module])
    expected = logits(PeftModel.from_pretrained(load(base), adapter))
    assert_logits(alone(base, adapter, other), expected)


def test_causal_masks_that_old_checkpoints_carry(make_base, alone, tmp_path):
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    base = make_base(config, tmp_path / "base")
    one, other = (perturb(base, tmp_path / f"{seed}", seed) for seed in (1, 2))
    masks = {f"transformer.h.{layer}.attn.bias": torch.ones(32, 32).tril()[None, None] for layer in (0, 1)}
    save_file(weights_of(base) | masks, base / "model.safetensors", metadata={"format": "pt"})
    assert_logits(alone(base, one, other), logits(load(one)))
    with pytest.raises(InputError, match=r"the weights of a gpt2 are stored transposed.*use output.format: full"):
        alone(base, one, other, "adapter", output={"format": "adapter", "rank": 4})


def test_factors_of_conv1d_layers_whatever_the_config_says(make_base, alone, tmp_path):
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    base = make_base(config, tmp_path / "base")
    one, other = (train(base, tmp_path / f"{seed}", seed, target_modules=["attn.c_proj"]) for seed in (1, 2))
    for folder in (one, other):
        settings = json.loads((folder / "adapter_config.json").read_text())
        assert settings["fan_in_fan_out"]
        (folder / "adapter_config.json").write_text(json.dumps(settings | {"fan_in_fan_out": False}))
    with pytest.raises(InputError, match="has factors of Conv1D layers, as the linear layers of a gpt2 are"):
        alone(base, one, other)


EXPERTS = {
    "Qwen3MoeConfig": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "MixtralConfig": {"num_local_experts": 4},
    "Qwen2MoeConfig": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


@pytest.mark.parametrize(
    ("kind", "router", "refused"),
    [
        ("Qwen3MoeConfig", False, None),
        ("Qwen3MoeConfig", True, "mlp.gate.weight, which a LoRA adapter cannot hold"),
        ("MixtralConfig", True, None),
        ("Qwen2MoeConfig", False, "PEFT takes factors of .*shared_expert.* for those of experts"),
    ],
)
def test_adapters_of_full_mixtures_of_experts_load_or_are_refused(make_base, alone, tmp_path, kind, router, refused):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    base = make_base(getattr(transformers, kind)(**sizes, **heads, **EXPERTS[kind]), tmp_path / "base")
    folders = []
    for seed in (1, 2):
        model = load(base)
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "layers" in name and parameter.dim() > 1 and (router or ".gate." not in name):
                    parameter += 0.05 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / f"{seed}")
        folders.append(tmp_path / f"{seed}")
    output = {"format": "adapter", "rank": 32}
    if refused is None:
        merged = alone(base, *folders, output=output)
        loaded = PeftModel.from_pretrained(load(base), merged)
        torch.testing.assert_close(logits(loaded), logits(load(folders[0])), rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises(InputError, match=refused):
            alone(base, *folders, output=output)


@pytest.mark.parametrize("granularity", ["both", "layer"])
def test_factors_of_the_head_have_the_coefficients_outside_the_layers(llama, recipe, merge, tmp_path, granularity):
    base = llama / "base"
    specialists = {}
    for seed, name in enumerate(NAMES):
        folder = train(base, tmp_path / name, seed, target_modules=["q_proj", "lm_head"])
        factors = {key: own for key, own in load_file(folder / "adapter_model.safetensors").items() if "lora_" in key}
        save_file(factors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        specialists[name] = {"model": str(folder)}
    coefficients = {"from": "embedding_signals", "granularity": granularity, "projections": 32}
    coefficients["outside"] = {name: float(name == "protein") for name in NAMES}
    content = recipe | {"base": str(base), "specialists": specialists, "space": "factors"}
    merged = merge(content | {"coefficients": coefficients, "output": {"format": "full", "dtype": "float32"}})
    expected = PeftModel.from_pretrained(load(base), specialists["protein"]["model"]).merge_and_unload().lm_head.weight
    torch.testing.assert_close(weights_of(merged)["lm_head.weight"], expected.detach(), rtol=1e-5, atol=1e-6)


def test_space_factors_names_what_is_no_factor(llama, alone, tmp_path):
    base = llama / "base"
    one, other = (train(base, tmp_path / f"{seed}", seed, target_modules=["q_proj", "lm_head"]) for seed in (1, 2))
    with pytest.raises(InputError, match=r"also has base_model.model.lm_head.base_layer.weight; use space: weights"):
        alone(base, one, other, space="factors")


def test_an_adapter_without_linear_layers_beside_one_with(llama, alone, tmp_path):
    """Where it changes nothing, there is nothing that an adapter could not hold."""
    base = llama / "base"
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["embed_tokens"])
    get_peft_model(load(base), config).save_pretrained(tmp_path / "untrained")
    one = train(base, tmp_path / "one", 1, target_modules=["q_proj"])
    merged = alone(base, one, tmp_path / "untrained", output={"format": "adapter"})
    expected = logits(PeftModel.from_pretrained(load(base), one))
    torch.testing.assert_close(logits(PeftModel.from_pretrained(load(base), merged)), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="there is nothing to merge"):
        alone(base, tmp_path / "untrained", tmp_path / "untrained", "nothing", output={"format": "adapter", "rank": 4})
