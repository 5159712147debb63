"""Bad input ends in one sentence that names culprit and remedy, and leaves nothing behind."""

import json
import shutil
import signal
import subprocess

import pytest
import torch
import yaml
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from esmerge.methods import METHODS

CASES = []


def case(culprit, remedy, *options):
    """Registers a function that spoils an input: both texts must be in the message."""

    def register(spoil):
        CASES.append(pytest.param(spoil, culprit, remedy, options, id=spoil.__name__.replace("_", " ")))
        return spoil

    return register


class Inputs:
    """A recipe and the files it names, in a folder of their own."""

    def __init__(self, folder, recipe):
        self.folder, self.recipe = folder, recipe

    def __truediv__(self, name):
        return self.folder / name

    def change_json(self, name, **fields):
        content = json.loads((self / name).read_text())
        (self / name).write_text(json.dumps(content | fields))

    def change_tensors(self, name, change):
        tensors = load_file(self / name)
        change(tensors)
        save_file(tensors, self / name, metadata={"format": "pt"})

    def save_recipe(self):
        (self / "recipe.yaml").write_text(yaml.safe_dump(self.recipe, sort_keys=False))
        return self / "recipe.yaml"

    def train(self, **settings):
        """Replaces the molecule's adapter by another kind."""
        model = AutoModelForCausalLM.from_pretrained(self / "base")
        settings = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"]} | settings
        shutil.rmtree(self / "molecule")
        model = get_peft_model(model, LoraConfig(**settings))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1)
        model.save_pretrained(self / "molecule")

    def to_tensors(self, **tensors):
        """Makes the probe one of ready tensors, which may replace those of a sound one."""
        mask = torch.zeros(3, 6, dtype=torch.bool)
        mask[:, 2] = True
        sound = {"inputs_embeds": torch.randn(3, 6, 32), "attention_mask": torch.ones(3, 6, dtype=torch.int64)}
        sound |= {f"mask.{name}": mask.clone() for name in self.recipe["specialists"]}
        changed = {name: tensor for name, tensor in (sound | tensors).items() if tensor is not None}
        save_file(changed, self / "probe.safetensors")
        self.recipe["probe"] = {"tensors": "probe.safetensors"}


@pytest.fixture
def inputs(llama, tmp_path, recipe):
    names = ["base", *recipe["specialists"]]
    for name in names:
        shutil.copytree(llama / name, tmp_path / "inputs" / name)
    for name in recipe["specialists"]:
        shutil.copy(llama / f"{name}.txt", tmp_path / "inputs")
    return Inputs(tmp_path / "inputs", recipe)


# Folders and files


@case("specialists.cell.model", "does not exist")
def missing_adapter_folder(inputs):
    inputs.recipe["specialists"]["cell"]["model"] = "./nowhere"


@case("base: ", "does not exist")
def missing_base_folder(inputs):
    inputs.recipe["base"] = "./nowhere"


@case("no/where is no folder here", "Hub")
def neither_folder_nor_hub_repository(inputs):
    inputs.recipe["base"] = "no/where"


@case("adapter_model.safetensors is a file", "give the folder")
def file_instead_of_folder(inputs):
    inputs.recipe["specialists"]["cell"]["model"] = "cell/adapter_model.safetensors"


@case("cell has neither adapter_config.json", "PEFT LoRA adapter")
def folder_without_adapter(inputs):
    (inputs / "cell" / "adapter_config.json").unlink()


@case("base/config.json is missing", "config.json")
def base_without_config(inputs):
    (inputs / "base" / "config.json").unlink()


@case("config.json is no valid JSON", "config.json")
def base_with_broken_config(inputs):
    (inputs / "base" / "config.json").write_text("{")


@case("base: transformers cannot build", "config.json")
def base_of_unknown_architecture(inputs):
    inputs.change_json("base/config.json", model_type="nonesuch", architectures=["Nonesuch"])


@case("base: transformers cannot build", "attention heads (5)")
def base_with_numbers_that_do_not_fit(inputs):
    inputs.change_json("base/config.json", num_attention_heads=5, head_dim=None)


@case("with coefficients.p = 500", "smaller")
def distances_beyond_all_numbers(inputs):
    inputs.recipe["coefficients"] |= {"p": 500.0}


@case("coefficients.alpha = 1e+308", "alpha must be smaller")
def coefficients_that_are_no_numbers(inputs):
    inputs.recipe["coefficients"] |= {"alpha": 1e308}


@case("base: the tokenizer", "cannot be loaded")
def tokenizer_that_cannot_be_read(inputs):
    inputs.change_json("base/tokenizer.json", model={"type": "Nonesuch"})


@case("the chat template of", "cannot be used")
def chat_template_with_an_error_of_its_own(inputs):
    (inputs / "base" / "chat_template.jinja").write_text("{{ messages[0]['content'] + 3 }}")


@case("cell/adapter_model.safetensors is truncated", "download or save it again")
def truncated_adapter(inputs):
    weights = inputs / "cell" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


@case("base/model.safetensors is truncated", "download or save it again")
def truncated_base(inputs):
    weights = inputs / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


@case("cell/adapter_model.safetensors has a corrupt", "download or save it again")
def corrupt_adapter(inputs):
    weights = inputs / "cell" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[20:40] = b"x" * 20
    weights.write_bytes(content)


@case("cell holds its weights as a pickle (adapter_model.bin)", "convert it to adapter_model.safetensors")
def pickled_adapter(inputs):
    (inputs / "cell" / "adapter_model.safetensors").rename(inputs / "cell" / "adapter_model.bin")


@case("base holds its weights as a pickle (pytorch_model.bin)", "convert it to model.safetensors")
def pickled_base(inputs):
    (inputs / "base" / "model.safetensors").rename(inputs / "base" / "pytorch_model.bin")


@case("base has no model.safetensors", "model.safetensors.index.json")
def base_without_weights(inputs):
    (inputs / "base" / "model.safetensors").unlink()


@case("names the shard model-00001-of-00002.safetensors", "download it again")
def missing_shard(inputs):
    shard = "model-00001-of-00002.safetensors"
    (inputs / "base" / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": shard}}
    (inputs / "base" / "model.safetensors.index.json").write_text(json.dumps(index))


# Adapters of another base


def rename_layers(tensors):
    for name in list(tensors):
        tensors[name.replace("layers.2", "layers.7")] = tensors.pop(name)


@case("layers.7", "another base")
def adapter_of_a_deeper_base(inputs):
    inputs.change_tensors("cell/adapter_model.safetensors", rename_layers)


def widen(tensors):
    for name, tensor in tensors.items():
        if "lora_A" in name:
            tensors[name] = torch.cat([tensor, tensor], dim=1)


@case("model.layers.0.mlp.down_proj.weight with shape [32, 96]", "[32, 48]: it was trained from another base")
def adapter_of_a_wider_base(inputs):
    inputs.change_tensors("cell/adapter_model.safetensors", widen)


@case("has no lora_B", "model.layers.0.self_attn.q_proj")
def adapter_with_half_a_pair(inputs):
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    inputs.change_tensors("cell/adapter_model.safetensors", lambda tensors: tensors.pop(name))


@case("has rank 4, adapter_config.json says 8", "r and rank_pattern")
def adapter_with_the_config_of_another(inputs):
    inputs.change_json("cell/adapter_config.json", r=8)


# Adapters that are more than LoRA


@case("peft_type is IA3", "only LORA")
def adapter_that_is_no_lora(inputs):
    model = AutoModelForCausalLM.from_pretrained(inputs / "base")
    config = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])
    shutil.rmtree(inputs / "molecule")
    get_peft_model(model, config).save_pretrained(inputs / "molecule")


@case("bias", "use output.format: full")
def adapter_with_biases(inputs):
    inputs.change_json("base/config.json", attention_bias=True)
    tensors = load_file(inputs / "base" / "model.safetensors")
    for number in range(3):
        for name, size in (("q", 32), ("k", 16), ("v", 16), ("o", 32)):
            tensors[f"model.layers.{number}.self_attn.{name}_proj.bias"] = torch.zeros(size)
    save_file(tensors, inputs / "base" / "model.safetensors", metadata={"format": "pt"})
    inputs.train(bias="lora_only")


@case("lora_B.bias", "save it without them")
def adapter_with_biases_of_its_own(inputs):
    inputs.train(lora_bias=True)


@case("lm_head.weight", "use output.format: full")
def adapter_with_a_trained_head(inputs):
    inputs.train(modules_to_save=["lm_head"])


@case("model.layers.0.input_layernorm.weight", "use output.format: full")
def adapter_with_trained_norms(inputs):
    inputs.train(modules_to_save=["input_layernorm"])


@case("embed_tokens", "use output.format: full")
def adapter_with_trained_embeddings(inputs):
    inputs.train(target_modules=["q_proj", "embed_tokens"])


@case("base_model.model.lm_head.", "use output.format: full")
def adapter_of_the_head(inputs):
    inputs.train(target_modules=["q_proj", "lm_head"])


VARIANTS = {
    "init_lora_weights": ["pissa", "pissa_niter_16", "OLoRA", "corda", "loftq", "lora_ga", "of tomorrow"],
    "peft_type": ["ADALORA", "VBLORA", "LOHA", None],
    "layer_replication": [[[0, 2], [1, 3]]],
    "alora_invocation_tokens": [[5, 6]],
    "target_parameters": [["experts.gate_up_proj"]],
    "use_qalora": [True],
    "use_bdlora": [{"nblocks": 2}],
    "arrow_config": [{"top_k": 3}],
    "kasa_config": [{"beta": 1e-4}],
    "monteclora_config": [{"num_samples": 8}],
    "velora_config": [{"scale": 1.0}],
    "use_something_new": [True],
    "new_config": [{"a": 1}],
    "fan_in_fan_out": [True],
    "use_dora": [True],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in VARIANTS.items() for value in values])
def test_variant_of_lora_that_is_no_plain_delta(inputs, esmerge, tmp_path, field, value):
    inputs.change_json("cell/adapter_config.json", **{field: value})
    inputs.recipe["coefficients"] = "uniform"
    code, out, err = esmerge("merge", inputs.save_recipe(), "-o", tmp_path / "merged", "--quiet")
    assert (code, out) == (2, "")
    assert err.startswith("esmerge: ")
    assert err.count("\n") == 1
    assert f"cell/adapter_config.json: {field} is " in err
    assert "give the full checkpoint" in err or field == "use_dora"
    assert [path.name for path in tmp_path.iterdir()] == ["inputs"]


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva"])
def test_initialisation_that_leaves_the_base_alone(inputs, esmerge, tmp_path, init):
    inputs.change_json("cell/adapter_config.json", init_lora_weights=init)
    inputs.recipe["coefficients"] = "uniform"
    code, _, err = esmerge("merge", inputs.save_recipe(), "-o", tmp_path / "merged", "--quiet")
    assert (code, err) == (0, "")


CONFIGS = {
    "pattern that is no regular expression": (
        {"rank_pattern": {"*q_proj": 4}},
        "rank_pattern has '*q_proj', which is no regular expression (nothing to repeat): write .* for any text",
    ),
    "bracket that is never closed": (
        {"alpha_pattern": {"layers.[01": 4}},
        "alpha_pattern has 'layers.[01', which is no regular expression (unterminated character set)",
    ),
    "pattern without a number": (
        {"alpha_pattern": {"q_proj": None}},
        "alpha_pattern is None for 'q_proj', expected a number.",
    ),
    "pattern that is not a number": (
        {"alpha_pattern": {"q_proj": float("nan")}},
        "alpha_pattern is nan for 'q_proj', expected a number.",
    ),
    "pattern with a number in quotes": (
        {"rank_pattern": {"q_proj": "4"}},
        "rank_pattern is '4' for 'q_proj', expected a number.",
    ),
    "list of patterns": (
        {"rank_pattern": ["q_proj"]},
        "rank_pattern is ['q_proj'], expected a mapping from names of modules to numbers.",
    ),
    "alpha that is not a number": ({"lora_alpha": float("nan")}, "lora_alpha is nan, expected a positive number."),
    "infinite alpha": ({"lora_alpha": float("inf")}, "lora_alpha is inf, expected a positive number."),
    "alpha that is a switch": ({"lora_alpha": True}, "lora_alpha is True, expected a positive number."),
    "no rank": ({"r": None}, "r is None, expected a positive number."),
}


@pytest.mark.parametrize(("fields", "sentence"), CONFIGS.values(), ids=CONFIGS)
def test_config_of_an_adapter_that_cannot_be_read(inputs, esmerge, tmp_path, fields, sentence):
    inputs.change_json("cell/adapter_config.json", **fields)
    inputs.recipe["coefficients"] = "uniform"
    code, out, err = esmerge("merge", inputs.save_recipe(), "-o", tmp_path / "merged", "--quiet")
    assert (code, out) == (2, "")
    assert err.startswith("esmerge: ") and err.count("\n") == 1
    assert f"cell/adapter_config.json: {sentence}" in err
    assert [path.name for path in tmp_path.iterdir()] == ["inputs"]


@case("holds 2 trained tokens, which adapter_config.json (trainable_token_indices) does not name", "")
def tokens_that_are_no_numbers(inputs):
    inputs.train(trainable_token_indices=[3, 7])
    inputs.change_json("molecule/adapter_config.json", trainable_token_indices=["a", "b"])
    inputs.recipe["output"] = {"format": "full"}


@case("cell/adapter_config.json: use_dora is not set", "belongs to another adapter")
def magnitudes_of_an_adapter_that_is_no_dora(inputs):
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    inputs.change_tensors("cell/adapter_model.safetensors", lambda tensors: tensors.update({name: torch.ones(32)}))


# Values that are not finite


def poison(name, value=torch.nan):
    def change(tensors):
        tensors[name].view(-1)[3] = value

    return change


POISONED_FACTOR = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"


@case(POISONED_FACTOR, "save or download")
def nan_in_an_adapter(inputs):
    inputs.change_tensors("cell/adapter_model.safetensors", poison(POISONED_FACTOR))


@case(POISONED_FACTOR, "save or download", "--set=coefficients=uniform")
def infinity_in_an_adapter_merged_uniformly(inputs):
    inputs.change_tensors("cell/adapter_model.safetensors", poison(POISONED_FACTOR, torch.inf))


@case("model.layers.1.mlp.up_proj.weight has NaN", "has NaN or infinite values")
def nan_in_a_layer_of_the_base(inputs):
    inputs.change_tensors("base/model.safetensors", poison("model.layers.1.mlp.up_proj.weight"))


@case("model.norm.weight has NaN", "has NaN or infinite values")
def nan_in_the_final_norm_of_the_base(inputs):
    inputs.change_tensors("base/model.safetensors", poison("model.norm.weight"))


def poison_embeddings(tensors):
    tensors["model.embed_tokens.weight"][:, 3] = torch.nan


@case("model.embed_tokens.weight has NaN", "has NaN or infinite values")
def nan_in_the_embeddings_of_the_base(inputs):
    inputs.change_tensors("base/model.safetensors", poison_embeddings)


@case("lm_head.weight has NaN", "has NaN or infinite values", "--set=coefficients=uniform")
def nan_in_a_tensor_copied_from_the_base(inputs):
    inputs.change_tensors("base/model.safetensors", poison("lm_head.weight"))
    inputs.recipe["output"] = {"format": "full"}


@case("model.layers.1.mlp.up_proj.weight has NaN", "has NaN or infinite values", "--set=coefficients=uniform")
def nan_in_a_tensor_merged_from_the_base(inputs):
    inputs.change_tensors("base/model.safetensors", poison("model.layers.1.mlp.up_proj.weight"))
    inputs.recipe["output"] = {"format": "full"}


@case("lm_head.weight has values up to 1e+05, which float16 cannot hold", "output.dtype", "--set=coefficients=uniform")
def copied_values_too_large_for_half_precision(inputs):
    inputs.change_tensors("base/model.safetensors", poison("lm_head.weight", 1e5))
    inputs.recipe["output"] = {"format": "full", "dtype": "float16"}


def enlarge(name, factor=1e9):
    def change(tensors):
        tensors[name] *= factor

    return change


LARGE_FACTOR = POISONED_FACTOR.replace("lora_A", "lora_B")


@case("layers.1.mlp.up_proj.weight has values up to", "which float16 cannot hold", "--set=coefficients=uniform")
def merged_values_too_large_for_half_precision(inputs):
    inputs.change_tensors("cell/adapter_model.safetensors", enlarge(LARGE_FACTOR))
    inputs.recipe["output"] = {"format": "full", "dtype": "float16"}


@pytest.mark.parametrize("space", ["weights", "factors"])
def test_factors_too_large_for_half_precision(inputs, esmerge, tmp_path, space):
    inputs.change_tensors("cell/adapter_model.safetensors", enlarge(LARGE_FACTOR, 1e12))
    inputs.recipe |= {"coefficients": "uniform", "space": space, "output": {"dtype": "float16"}}
    code, out, err = esmerge("merge", inputs.save_recipe(), "-o", tmp_path / "merged", "--quiet")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "layers.1.mlp.up_proj.lora_" in err
    assert "which float16 cannot hold; set output.dtype to bfloat16 or float32" in err
    assert [path.name for path in tmp_path.iterdir()] == ["inputs"]


def test_values_whose_sum_alone_overflows(inputs, esmerge, tmp_path):
    """What is as large as a dtype can hold is finite all the same."""

    def fill(tensors):
        tensors["lm_head.weight"].fill_(torch.finfo(torch.float32).max)

    inputs.change_tensors("base/model.safetensors", fill)
    inputs.recipe |= {"coefficients": "uniform", "output": {"format": "full"}}
    code, _, err = esmerge("merge", inputs.save_recipe(), "-o", tmp_path / "merged", "--quiet")
    assert (code, err) == (0, "")
    merged, base = (load_file(f / "model.safetensors") for f in (tmp_path / "merged", inputs / "base"))
    assert torch.equal(merged["lm_head.weight"], base["lm_head.weight"])


# Full checkpoints


def to_full(inputs, name="cell", **settings):
    """Makes a specialist a full checkpoint: the base, slightly moved."""
    model = AutoModelForCausalLM.from_pretrained(inputs / "base", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01
    shutil.rmtree(inputs / name)
    model.save_pretrained(inputs / name, **settings)
    inputs.recipe["output"] = {"format": "full"}


def to_shards(inputs):
    to_full(inputs, max_shard_size="20KB")
    index = json.loads((inputs / "cell" / "model.safetensors.index.json").read_text())
    return index["weight_map"]


def save_index(inputs, text):
    (inputs / "cell" / "model.safetensors.index.json").write_text(text)


@case("names the shard model-00002-of-", "download it again")
def missing_shard_of_a_specialist(inputs):
    to_shards(inputs)
    next((inputs / "cell").glob("model-00002-*")).unlink()


@case("lists model.norm.weight twice", "save the checkpoint again")
def tensor_listed_twice_in_the_index(inputs):
    shards = to_shards(inputs)
    entries = [f'"{name}": "{shard}"' for name, shard in shards.items()]
    entries.append(f'"model.norm.weight": "{shards["lm_head.weight"]}"')
    save_index(inputs, f'{{"weight_map": {{{", ".join(entries)}}}}}')


@case("tensor model.norm.weight is in the shard but not in the index", "model-00001-of-")
def tensor_in_two_shards(inputs):
    shards = to_shards(inputs)
    first = next((inputs / "cell").glob("model-00001-*")).name
    assert shards["model.norm.weight"] != first
    inputs.change_tensors(f"cell/{first}", lambda tensors: tensors.update({"model.norm.weight": torch.ones(32)}))
    entries = [f'"{name}": "{shard}"' for name, shard in shards.items()]
    save_index(inputs, f'{{"weight_map": {{{", ".join(entries)}}}}}')


@case("tensor lm_head.bias is in the index but not in the shard", "save the checkpoint again")
def index_that_names_more_than_there_is(inputs):
    shards = to_shards(inputs)
    save_index(inputs, json.dumps({"weight_map": shards | {"lm_head.bias": shards["lm_head.weight"]}}))


@case("tensor lm_head.weight is in the shard but not in the index", "save the checkpoint again")
def index_that_names_less_than_there_is(inputs):
    shards = to_shards(inputs)
    name = shards.pop("lm_head.weight")
    save_index(inputs, json.dumps({"weight_map": shards | {"other": name}}))
    # The shard has neither more nor fewer tensors than the index gives it.
    inputs.change_tensors(f"cell/{name}", lambda tensors: tensors.update({"other": torch.ones(2)}))


@case("cell/model.safetensors.index.json is no safetensors index", "weight_map")
def index_that_is_none(inputs):
    to_shards(inputs)
    save_index(inputs, "{}")


@case("model.layers.1.mlp.up_proj.weight with shape [47, 32]", "[48, 32]: it was trained from another base")
def one_tensor_of_another_shape(inputs):
    name = "model.layers.1.mlp.up_proj.weight"
    to_full(inputs)
    inputs.change_tensors("cell/model.safetensors", lambda tensors: tensors.update({name: tensors[name][:47].clone()}))


@case("lacks 1 tensors of the base", "model.layers.1.mlp.up_proj.weight: it is incomplete")
def full_checkpoint_that_lacks_a_tensor(inputs):
    to_full(inputs)
    inputs.change_tensors("cell/model.safetensors", lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))


@case("cell has 1 tensors that change nothing in the base", "extra.weight")
def full_checkpoint_with_a_tensor_of_its_own(inputs):
    to_full(inputs)
    inputs.change_tensors("cell/model.safetensors", lambda tensors: tensors.update({"extra.weight": torch.ones(3)}))


@case("cell is Mistral, the base is Llama", "trained from the base")
def full_checkpoint_of_another_architecture(inputs):
    to_full(inputs)
    inputs.change_json("cell/config.json", model_type="mistral", architectures=["MistralForCausalLM"])


OTHER_ARCHITECTURES = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "hidden_act": "gelu",
    "rms_norm_eps": 1e-3,
    "rope_theta": 5e5,
}


@pytest.mark.parametrize("field", OTHER_ARCHITECTURES)
def test_full_checkpoint_that_computes_in_another_way(inputs, esmerge, tmp_path, field):
    """Tensors of the same shapes can be those of another model: heads, rotary embeddings, activation."""
    to_full(inputs)
    value = OTHER_ARCHITECTURES[field]
    if field == "rope_theta":
        inputs.change_json("cell/config.json", rope_parameters={"rope_type": "default", "rope_theta": value})
    else:
        inputs.change_json("cell/config.json", **{field: value})
    inputs.recipe["coefficients"] = "uniform"
    code, out, err = esmerge("merge", inputs.save_recipe(), "-o", tmp_path / "merged", "--quiet")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{field} {value}, the base " in err
    assert err.startswith("esmerge: cell has ")
    assert [path.name for path in tmp_path.iterdir()] == ["inputs"]


def test_full_checkpoint_whose_config_says_the_same_in_other_words(inputs, esmerge, tmp_path):
    """Older versions had other names for rotary embeddings, and left out what was at its default."""
    to_full(inputs)
    config = json.loads((inputs / "cell" / "config.json").read_text())
    rotary = config.pop("rope_parameters")
    for default in ("head_dim", "hidden_act", "rms_norm_eps"):
        assert config.pop(default) is not None
    (inputs / "cell" / "config.json").write_text(json.dumps(config | {"rope_theta": rotary["rope_theta"]}))
    inputs.recipe["coefficients"] = "uniform"
    code, _, err = esmerge("merge", inputs.save_recipe(), "-o", tmp_path / "merged", "--quiet")
    assert (code, err) == (0, "")


def test_full_checkpoint_with_another_default(inputs, esmerge, tmp_path):
    to_full(inputs)
    config = json.loads((inputs / "cell" / "config.json").read_text())
    del config["rope_parameters"]
    (inputs / "cell" / "config.json").write_text(json.dumps(config))
    inputs.change_json("base/config.json", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    inputs.recipe["coefficients"] = "uniform"
    code, _, err = esmerge("merge", inputs.save_recipe(), "-o", tmp_path / "merged", "--quiet")
    assert code == 2
    assert "cell has rope_parameters.rope_theta 10000.0, the base 500000.0" in err


QUANTISED = {
    "bitsandbytes": "model.layers.0.mlp.up_proj.SCB",
    "GPTQ or AWQ": "model.layers.0.mlp.up_proj.qweight",
    "compressed-tensors": "model.layers.0.mlp.up_proj.weight_packed",
    "fp8": "model.layers.0.mlp.up_proj.weight_scale_inv",
}


@pytest.mark.parametrize("who", ["base", "cell"])
@pytest.mark.parametrize("method", QUANTISED)
def test_quantised_checkpoint_whose_config_does_not_say_so(inputs, esmerge, tmp_path, who, method):
    to_full(inputs)
    inputs.change_tensors(
        f"{who}/model.safetensors", lambda t: t.update({QUANTISED[method]: torch.ones(48, dtype=torch.int32)})
    )
    inputs.recipe["coefficients"] = "uniform"
    code, out, err = esmerge("merge", inputs.save_recipe(), "-o", tmp_path / "merged", "--quiet")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"is quantised ({method}); " in err
    assert ("the base base" if who == "base" else "specialist cell") in err
    assert "in bfloat16" in err


@case("model.layers.0.mlp.up_proj.weight is stored as torch.float8_e4m3fn", "use the base in bfloat16")
def base_in_fp8_where_nothing_is_merged(inputs):
    for name in inputs.recipe["specialists"]:
        inputs.change_tensors(
            f"{name}/adapter_model.safetensors",
            lambda tensors: [tensors.pop(n) for n in list(tensors) if "q_proj" not in n],
        )
    inputs.change_tensors("base/model.safetensors", to_fp8)


def test_buffers_of_whole_numbers(inputs, esmerge, tmp_path):
    """They are the base's; a specialist may lack them, or have more."""
    to_full(inputs)
    mask = {"model.layers.0.self_attn.bias": torch.ones(4, 4, dtype=torch.bool).tril(), "step": torch.tensor(7)}
    inputs.change_tensors("base/model.safetensors", lambda tensors: tensors.update(mask))
    other = {"other": torch.arange(3), "step": torch.tensor(7)}
    inputs.change_tensors("cell/model.safetensors", lambda tensors: tensors.update(other))
    inputs.recipe["coefficients"] = "uniform"
    code, _, err = esmerge("merge", inputs.save_recipe(), "-o", tmp_path / "merged", "--quiet")
    assert (code, err) == (0, "")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(merged[name], tensor) for name, tensor in mask.items())
    assert "other" not in merged
    record = yaml.safe_load((tmp_path / "merged" / "esmerge.yaml").read_text())
    assert record["left_out"]["cell"] == {"buffers of whole numbers that the base does not have": 1}


@case("cell/model.safetensors: tensor step (torch.int64) is not that of the base base", "trained from another base")
def buffer_of_whole_numbers_that_differs(inputs):
    to_full(inputs)
    inputs.change_tensors("base/model.safetensors", lambda tensors: tensors.update({"step": torch.tensor(7)}))
    inputs.change_tensors("cell/model.safetensors", lambda tensors: tensors.update({"step": torch.tensor(8)}))


@case("model.layers.0.mlp.up_proj.weight is stored as torch.int8; quantised weights", "save the specialist in bfloat16")
def specialist_in_int8(inputs):
    name = "model.layers.0.mlp.up_proj.weight"
    to_full(inputs)
    inputs.change_tensors("cell/model.safetensors", lambda t: t.update({name: t[name].to(torch.int8)}))


# Methods that match need a probe, and so a model that knows all of its tensors.
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.match is None])
@pytest.mark.parametrize("output", [{"format": "full"}, {"rank": 4}], ids=["full", "adapter"])
def test_empty_tensors_and_scalars(inputs, esmerge, tmp_path, method, output):
    if METHODS[method].specialists == 2:
        del inputs.recipe["specialists"]["molecule"]
    for name in inputs.recipe["specialists"]:
        to_full(inputs, name)
    odd = {
        "model.layers.0.empty": torch.zeros(0, 4),
        "model.layers.0.narrow": torch.zeros(4, 0),
        "model.layers.1.scalar": torch.tensor(2.0),
        "model.layers.1.single": torch.ones(1, 1),
    }
    for name in ("base", *inputs.recipe["specialists"]):
        inputs.change_tensors(f"{name}/model.safetensors", lambda tensors: tensors.update(odd))
    if output["format" if "format" in output else "rank"] == "full":
        moved = {"model.layers.1.scalar": torch.tensor(3.0), "model.layers.1.single": torch.tensor([[3.0]])}
        inputs.change_tensors("cell/model.safetensors", lambda tensors: tensors.update(moved))
    else:
        # An adapter holds no norms and no embeddings: those stay the base's.
        base = load_file(inputs / "base" / "model.safetensors")
        kept = {name: tensor for name, tensor in base.items() if "_proj" not in name}
        for name in inputs.recipe["specialists"]:
            inputs.change_tensors(f"{name}/model.safetensors", lambda tensors: tensors.update(kept))
    inputs.recipe |= {"coefficients": "uniform", "method": method, "output": output}
    code, _, err = esmerge("merge", inputs.save_recipe(), "-o", tmp_path / "merged", "--quiet")
    assert (code, err) == (0, "")
    if "format" in output:
        merged = load_file(tmp_path / "merged" / "model.safetensors")
        assert merged["model.layers.0.empty"].shape == (0, 4)
        assert merged["model.layers.0.narrow"].shape == (4, 0)
        assert merged["model.layers.1.scalar"].shape == ()
        assert 2 <= float(merged["model.layers.1.scalar"]) <= 3


def to_fp8(tensors):
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)


@case("model.layers.0.mlp.up_proj.weight is stored as torch.float8_e4m3fn", "in bfloat16, float16 or float32")
def specialist_in_fp8(inputs):
    to_full(inputs)
    inputs.change_tensors("cell/model.safetensors", to_fp8)


@case("model.layers.0.mlp.up_proj.weight is stored as torch.float8_e4m3fn", "use the base in bfloat16")
def base_in_fp8(inputs):
    inputs.change_tensors("base/model.safetensors", to_fp8)


@case("specialist cell: ", "is quantised (bitsandbytes); save it dequantised")
def quantised_specialist(inputs):
    to_full(inputs)
    inputs.change_json("cell/config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})


@case("the base base is quantised", "use it in bfloat16, float16 or float32")
def quantised_base(inputs):
    inputs.change_json("base/config.json", quantization_config={"quant_method": "gptq", "bits": 4})


@case("cell holds its weights as a pickle (pytorch_model.bin)", "convert it to model.safetensors")
def pickled_specialist(inputs):
    to_full(inputs)
    (inputs / "cell" / "model.safetensors").rename(inputs / "cell" / "pytorch_model.bin")


@case("model.layers.1.mlp.up_proj.weight has NaN", "cell/model.safetensors", "--set=coefficients=uniform")
def nan_in_a_full_checkpoint(inputs):
    to_full(inputs)
    inputs.change_tensors("cell/model.safetensors", poison("model.layers.1.mlp.up_proj.weight"))


@case("cell/model.safetensors: tensor model.layers.1.mlp.up_proj.weight has NaN", "download or save it again")
def nan_in_a_full_checkpoint_under_the_probe(inputs):
    to_full(inputs)
    inputs.change_tensors("cell/model.safetensors", poison("model.layers.1.mlp.up_proj.weight"))


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("output", [{"format": "full"}, {"rank": 4}], ids=["full", "adapter"])
@pytest.mark.parametrize(
    "method",
    [
        *({"name": name, "density": 0.5} for name in ("ties", "dare_ties", "della", "breadcrumbs", "pcb")),
        {"name": "sce", "select_topk": 0.5},
        "karcher",
        "model_stock",
        "tsv",
        "iso_c",
    ],
    ids=lambda method: method if isinstance(method, str) else method["name"],
)
def test_nan_under_any_method(inputs, esmerge, tmp_path, method, output, value):
    """Methods that sort or decompose values fail in their own ways; the message names the input all the same."""
    name = "model.layers.1.mlp.up_proj.weight"
    to_full(inputs)
    tensors = load_file(inputs / "base" / "model.safetensors")
    tensors[name] += torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(0))
    tensors[name].view(-1)[3] = value
    save_file(tensors, inputs / "cell" / "model.safetensors", metadata={"format": "pt"})
    inputs.recipe |= {"coefficients": "uniform", "method": method, "output": output}
    code, out, err = esmerge("merge", inputs.save_recipe(), "-o", tmp_path / "merged", "--quiet")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"cell/model.safetensors: tensor {name} has NaN or infinite values" in err
    assert [path.name for path in tmp_path.iterdir()] == ["inputs"]


@case("output.rank is missing", "full checkpoint cell")
def full_checkpoint_into_an_adapter_without_rank(inputs):
    to_full(inputs)
    weights = load_file(inputs / "base" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] += 1
    save_file(weights, inputs / "cell" / "model.safetensors", metadata={"format": "pt"})
    inputs.recipe["output"] = {}


@case("cell changes model.layers.0.input_layernorm.weight, which a LoRA adapter cannot hold", "format: full")
def full_checkpoint_with_other_norms_into_an_adapter(inputs):
    to_full(inputs)
    inputs.recipe["output"] = {"rank": 4}


@case("space factors needs LoRA adapters", "use space: weights", "--set=space=factors")
def full_checkpoint_in_the_space_of_factors(inputs):
    to_full(inputs)


@case("lora_magnitude_vector", "use space: weights", "--set=space=factors")
def dora_in_the_space_of_factors(inputs):
    inputs.train(use_dora=True)


@case("embed_tokens.lora_magnitude_vector", "cannot be merged")
def dora_of_embeddings(inputs):
    inputs.train(use_dora=True, target_modules=["q_proj", "embed_tokens"])
    inputs.recipe["output"] = {"format": "full"}


# Methods and coefficients


@case("method: name is 'tise'; did you mean ties?", "known: linear,", "--set=method=tise")
def unknown_method(inputs):
    pass


@case("densty is no parameter of ties; did you mean density?", "known: density,", "--set=method.densty=0.5")
def unknown_parameter_of_a_method(inputs):
    inputs.recipe["method"] = {"name": "ties"}


@case("density is no parameter of model_stock", "it has none", "--set=method={name: model_stock, density: 1}")
def parameter_of_a_method_that_has_none(inputs):
    pass


@case("density is 0", "greater than 0", "--set=method={name: ties, density: 0}")
def density_of_zero(inputs):
    pass


@case("density is 1.5", "less than or equal to 1", "--set=method={name: dare_ties, density: 1.5}")
def density_above_one(inputs):
    pass


@case("density is -0.1", "greater than 0", "--set=method={name: breadcrumbs, density: -0.1}")
def negative_density(inputs):
    pass


@case("lambda is nan", "finite number", "--set=method={name: ties, lambda: .nan}")
def lambda_that_is_no_number(inputs):
    pass


@case("density 0.9 plus and minus epsilon 0.15", "between 0 and 1", "--set=method={name: della, density: 0.9}")
def keeping_probabilities_above_one(inputs):
    pass


@case("slerp merges 2 specialists", "the recipe has 3", "--set=method=slerp")
def three_specialists_for_a_method_of_two(inputs):
    pass


@case("coefficients.cell is -0.5", "use 0 or more")
def negative_weight(inputs):
    inputs.recipe["coefficients"] = {"molecule": 1, "protein": 1, "cell": -0.5}


@case("coefficients.cell is -1", "use 0 or more")
def negative_weight_in_a_pattern(inputs):
    inputs.recipe["coefficients"] = {"molecule": 1, "protein": 1, "cell": {"layers.0.*": -1, "*": 1}}


@case("coefficients are all 0", "at least one must be positive")
def weights_that_are_all_zero(inputs):
    inputs.recipe["coefficients"] = {"molecule": 0, "protein": 0, "cell": 0}


@case("coefficients are all 0", "at least one must be positive")
def patterns_that_are_all_zero(inputs):
    inputs.recipe["coefficients"] = {"molecule": 0, "protein": {"*": 0}, "cell": {"layers.0.*": 0, "*": 0}}


@case("coefficients.outside.cel", "did you mean cell?")
def coefficient_outside_for_an_unknown_specialist(inputs):
    inputs.recipe["coefficients"]["outside"] = {"molecule": 1, "protein": 1, "cel": 1}


@case("coefficients.cell: the pattern 'layer.0.*' matches no tensor", "are like layers.0.")
def pattern_that_matches_nothing(inputs):
    inputs.recipe["coefficients"] = {"molecule": 1, "protein": 1, "cell": {"layer.0.*": 1, "*": 0}}


@case("coefficients.cell: no pattern matches layers.1.", "end with the pattern '*'")
def tensor_that_no_pattern_matches(inputs):
    inputs.recipe["coefficients"] = {"molecule": 1, "protein": 1, "cell": {"layers.0.*": 1}}


@case("coefficients.outside.cell is -1", "use 0 or more")
def negative_coefficient_outside(inputs):
    inputs.recipe["coefficients"]["outside"] = {"molecule": 1, "protein": 1, "cell": -1}


# The probe


@case("cell.txt has 0 items", "lower probe.samples")
def empty_data_file(inputs):
    (inputs / "cell.txt").write_text("\n\n")


@case("cell.txt has 2 items, probe.samples asks for 5", "lower probe.samples")
def too_few_rows(inputs):
    (inputs / "cell.txt").write_text("CD3D, CD8A\n\nLYZ\n")


@case("probe.samples is 0", "greater than or equal to 1")
def no_samples(inputs):
    inputs.recipe["probe"]["samples"] = 0


@case("probe.data.cell", "does not exist")
def missing_data_file(inputs):
    (inputs / "cell.txt").unlink()


@case("probe.data.cell", "UTF-8")
def data_file_that_is_no_text(inputs):
    (inputs / "cell.txt").write_bytes(b"\xff\xfe\x00\n" * 9)


@case("probe.data has the modality tissue", "no specialist has that name")
def modality_without_specialist(inputs):
    inputs.recipe["probe"]["data"]["tissue"] = "cell.txt"


@case("probe.data has no modality cell", "specialist cell needs")
def specialist_without_modality(inputs):
    del inputs.recipe["probe"]["data"]["cell"]


@case("probe.template must have the placeholder {cell} once", "it has 0")
def placeholder_missing_from_the_template(inputs):
    inputs.recipe["probe"]["template"] = "{molecule} {protein}"


@case("placeholder {tissue}", "no specialist has that name")
def placeholder_of_no_modality(inputs):
    inputs.recipe["probe"]["template"] += " {tissue}"


@case("probe.template is no valid template", "braces twice")
def template_with_a_single_brace(inputs):
    inputs.recipe["probe"]["template"] += " {"


@case("no chat template", "set probe.chat_template")
def tokenizer_without_chat_template(inputs):
    (inputs / "base" / "chat_template.jinja").unlink()


@case("probe.chat_template", "Jinja")
def chat_template_that_is_no_jinja(inputs):
    inputs.recipe["probe"]["chat_template"] = "{% for %}"


@case("base has no tokenizer", "save it there with tokenizer.save_pretrained")
def base_without_tokenizer(inputs):
    for file in (inputs / "base").glob("*token*"):
        file.unlink()


@case("its embedding has only 50 rows", "use the tokenizer that belongs to the base")
def tokenizer_of_another_base(inputs):
    def cut(tensors):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:50].clone()

    inputs.change_tensors("base/model.safetensors", cut)
    inputs.change_json("base/config.json", vocab_size=50)


@case("probe.tensors: the file", "does not exist")
def missing_probe_tensors(inputs):
    inputs.recipe["probe"] = {"tensors": "nowhere.safetensors"}


@case("probe.safetensors: the probe is empty", "empty")
def empty_probe_tensors(inputs):
    none = {f"mask.{name}": torch.zeros(0, 6, dtype=torch.bool) for name in inputs.recipe["specialists"]}
    inputs.to_tensors(inputs_embeds=torch.zeros(0, 6, 32), attention_mask=torch.zeros(0, 6).long(), **none)


@case("probe.safetensors", "inputs_embeds")
def probe_tensors_without_embeddings(inputs):
    inputs.to_tensors(inputs_embeds=None)


@case("has no modality cell", "cell")
def probe_tensors_without_a_modality(inputs):
    inputs.to_tensors(**{"mask.cell": None})


@case("has the modality tissue", "no specialist has that name")
def probe_tensors_with_an_unknown_modality(inputs):
    inputs.to_tensors(**{"mask.tissue": torch.ones(3, 6, dtype=torch.bool)})


@case("probe input 0 (counted from 0) has no position of cell", "cell")
def probe_tensors_with_an_empty_mask(inputs):
    inputs.to_tensors(**{"mask.cell": torch.zeros(3, 6, dtype=torch.bool)})


@case("inputs_embeds has shape [3, 6, 31]", "expected [inputs, positions, 32]")
def probe_tensors_of_another_base(inputs):
    inputs.to_tensors(inputs_embeds=torch.zeros(3, 6, 31))


@case("attention_mask", "shape")
def probe_tensors_with_a_flat_attention_mask(inputs):
    inputs.to_tensors(attention_mask=torch.ones(18, dtype=torch.int64))


@case("inputs_embeds has NaN", "probe.safetensors")
def probe_tensors_with_nan(inputs):
    inputs.to_tensors(inputs_embeds=torch.full((3, 6, 32), torch.nan))


# The recipe


@case("seeed is no known field", "did you mean seed?")
def unknown_key(inputs):
    inputs.recipe["seeed"] = 1


@case("coefficients.temprature is no known field", "did you mean temperature?")
def unknown_nested_key(inputs):
    inputs.recipe["coefficients"]["temprature"] = 1


@case("specialists.cell.modle is no known field", "did you mean model?")
def unknown_key_of_a_specialist(inputs):
    inputs.recipe["specialists"]["cell"]["modle"] = "cell"


@case("specialists.cell.modle is no known field", "did you mean model?")
def misspelt_key_of_a_specialist(inputs):
    inputs.recipe["specialists"]["cell"] = {"modle": "cell"}


@case("base_model is no known field", "did you mean base?")
def key_of_another_tool(inputs):
    inputs.recipe["base_model"] = inputs.recipe.pop("base")


@case("specialists: ['a', 'b'] has no names", "give each specialist one")
def specialists_without_names(inputs):
    inputs.recipe["specialists"] = ["a", "b"]


@case("output is 'full'", "expected a mapping with the fields format, rank, dtype, signals")
def text_instead_of_fields(inputs):
    inputs.recipe["output"] = "full"


@case("coefficients.granularity is no known field", "(known: from)")
def fields_of_signals_without_signals(inputs):
    inputs.recipe["coefficients"] = {"from": "uniform", "granularity": "layer"}


@case("granularity is 'layer', expected a number", "from: embedding_signals")
def signals_without_their_name(inputs):
    inputs.recipe["coefficients"] = {"granularity": "layer"}


@case("nam is no parameter of linear", "did you mean name?")
def misspelt_name_of_a_method(inputs):
    inputs.recipe["method"] = {"nam": "ties"}


@case("base is missing", "base")
def recipe_without_base(inputs):
    del inputs.recipe["base"]


@case("probe is missing", "coefficients from embedding signals need one")
def recipe_without_probe(inputs):
    del inputs.recipe["probe"]


@case("specialists has 1", "of at least 2 entries")
def single_specialist(inputs):
    inputs.recipe["specialists"] = {"cell": "cell"}


@case("coefficients.cel", "did you mean cell?")
def number_for_an_unknown_specialist(inputs):
    inputs.recipe["coefficients"] = {"molecule": 1, "protein": 1, "cel": 1}


@case("coefficients.temperature is 0", "greater than 0")
def temperature_of_zero(inputs):
    inputs.recipe["coefficients"]["temperature"] = 0


@case("coefficients", "expected embedding_signals, uniform or a number per specialist")
def coefficients_of_unknown_kind(inputs):
    inputs.recipe["coefficients"] = "equal"


@case("output.rank", "leave it out, or use space: weights")
def rank_of_merged_factors(inputs):
    inputs.recipe |= {"space": "factors", "output": {"rank": 4}}


@case("device tpu", "cannot be used")
def unknown_device(inputs):
    inputs.recipe["device"] = "tpu"


@case("parameters are those of a method here", "write method: {name: ties, density: ...}")
def parameters_as_mergekit_has_them(inputs):
    inputs.recipe |= {"method": "ties", "parameters": {"density": 0.5}}


@case("name is 'TIES'", "did you mean ties?")
def method_in_capitals(inputs):
    inputs.recipe["method"] = "TIES"


@case("output.rank is 'auto'", "expected a whole number")
def rank_in_words(inputs):
    inputs.recipe["output"] = {"rank": "auto"}


@case("device meta", "has no numbers")
def device_without_numbers(inputs):
    inputs.recipe["device"] = "meta"


@case("seed", "less than")
def seed_of_too_many_digits(inputs):
    inputs.recipe["seed"] = 10**23


@case("no numbers come of coefficients.tau", "tau must be larger")
def temperature_of_next_to_nothing(inputs):
    inputs.recipe["coefficients"] |= {"granularity": "element", "tau": 1e-40}


@case("lora_B.bias (lora_bias), but the base", "train without lora_bias")
def bias_of_a_branch_without_one_in_the_base(inputs):
    inputs.train(lora_bias=True)


@case("output.rank is missing: molecule changes", "lora_magnitude_vector, which is no pair of factors")
def adapter_of_dora_without_a_rank(inputs):
    inputs.train(use_dora=True)


@case("stores 4 layers, a LlamaForCausalLM of its config.json runs 3", "use coefficients and a method that need no")
def layers_that_the_base_does_not_run(inputs):
    def add(tensors):
        tensors |= {n.replace("layers.2.", "layers.3."): own.clone() for n, own in tensors.items() if "layers.2." in n}

    for name in ("base", "molecule"):
        file = "model.safetensors" if name == "base" else "adapter_model.safetensors"
        inputs.change_tensors(f"{name}/{file}", add)


@case("device cuda:99", "cannot be used here", "--set=coefficients=uniform")
def missing_device_without_a_probe(inputs):
    inputs.recipe["device"] = "cuda:99"
    del inputs.recipe["probe"]


@case("molecule has rank 4 and protein rank 6", "use space: weights", "--set=space=factors")
def unequal_ranks_of_factors(inputs):
    inputs.train(target_modules=["q_proj"])
    shutil.rmtree(inputs / "protein")
    shutil.copytree(inputs / "molecule", inputs / "cell", dirs_exist_ok=True)
    (inputs / "molecule").rename(inputs / "protein")
    shutil.copytree(inputs / "cell", inputs / "molecule")
    inputs.change_json("protein/adapter_config.json", r=6)
    inputs.change_tensors("protein/adapter_model.safetensors", pad_to_rank_6)


def pad_to_rank_6(tensors):
    for name, tensor in tensors.items():
        tensors[name] = tensor.new_zeros((6, 32) if "lora_A" in name else (32, 6))


@case("only in protein: layers.0.mlp.down_proj", "use space: weights", "--set=space=factors")
def unequal_modules_of_factors(inputs):
    inputs.train()


# Overrides


@case("--set seed", "expected FIELD=VALUE", "--set=seed")
def override_without_value(inputs):
    pass


@case("seeed is no known field", "did you mean seed?", "--set=seeed=3")
def override_of_an_unknown_field(inputs):
    pass


@case("recipe.yaml with --set seed=many: seed is 'many'", "expected a whole number", "--set=seed=many")
def override_with_a_value_of_another_type(inputs):
    pass


@case("base is 'base' in the recipe", "no fields", "--set=base.model=x")
def override_below_a_value(inputs):
    pass


@case("--set seed=[", "YAML", "--set=seed=[")
def override_that_is_no_yaml(inputs):
    pass


@pytest.mark.parametrize(("spoil", "culprit", "remedy", "options"), CASES)
def test_one_sentence_and_nothing_left(inputs, esmerge, tmp_path, spoil, culprit, remedy, options):
    spoil(inputs)
    recipe = inputs.save_recipe()
    inputs_before = sorted(inputs.folder.rglob("*"))
    code, out, err = esmerge("merge", recipe, "-o", tmp_path / "merged", "--quiet", *options)
    assert code == 2, err
    assert not out
    assert err.startswith("esmerge: ")
    assert err.count("\n") == 1
    assert culprit in err
    assert remedy in err
    assert sorted(inputs.folder.rglob("*")) == inputs_before
    assert [path.name for path in tmp_path.iterdir()] == ["inputs"]


@pytest.mark.parametrize("content", [None, "", "just text", "base: [", "base: a\n  b: c"])
def test_recipe_that_is_none(esmerge, tmp_path, content):
    if content is not None:
        (tmp_path / "recipe.yaml").write_text(content)
    code, _, err = esmerge("merge", tmp_path / "recipe.yaml", "-o", tmp_path / "merged")
    assert code == 2
    assert err.startswith("esmerge: the recipe ")
    assert err.count("\n") == 1


def test_two_specialists_of_one_modality(inputs, esmerge, tmp_path):
    recipe = inputs.save_recipe()
    recipe.write_text(recipe.read_text().replace("specialists:\n", "specialists:\n  molecule: {model: protein}\n"))
    code, _, err = esmerge("merge", recipe, "-o", tmp_path / "merged")
    assert code == 2
    assert "molecule stands there twice" in err
    assert "line" in err


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_output_that_exists(inputs, esmerge, tmp_path, kind):
    output = tmp_path / "merged"
    if kind == "folder":
        output.mkdir()
        (output / "precious.txt").write_text("keep me")
    elif kind == "file":
        output.write_text("keep me")
    else:
        output.symlink_to(tmp_path / "nowhere")
    inputs.recipe["coefficients"] = "uniform"
    code, _, err = esmerge("merge", inputs.save_recipe(), "-o", output)
    assert code == 2
    assert err == f"esmerge: the output {output} exists: choose another folder or remove it first.\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inputs", "merged"]
    assert kind == "dangling link" or "keep me" in (output / "precious.txt" if kind == "folder" else output).read_text()


def test_output_below_a_file(inputs, esmerge, tmp_path):
    (tmp_path / "file").write_text("")
    inputs.recipe["coefficients"] = "uniform"
    code, _, err = esmerge("merge", inputs.save_recipe(), "-o", tmp_path / "file" / "merged")
    assert code == 2
    assert "cannot be written" in err


def test_folders_made_for_an_output_that_failed(inputs, esmerge, tmp_path):
    inputs.change_tensors("cell/adapter_model.safetensors", poison(POISONED_FACTOR))
    inputs.recipe["coefficients"] = "uniform"
    (tmp_path / "there").mkdir()
    code, _, _ = esmerge("merge", inputs.save_recipe(), "-o", tmp_path / "there" / "new" / "newer" / "merged")
    assert code == 2
    assert (tmp_path / "there").is_dir()
    assert not list((tmp_path / "there").iterdir())


def test_inspect_of_a_folder_that_is_no_result(esmerge, tmp_path):
    code, out, err = esmerge("inspect", tmp_path)
    assert (code, out) == (2, "")
    assert err == f"esmerge: {tmp_path} is no esmerge result: it has no coefficients.safetensors.\n"


def test_inspect_of_a_model_without_layers(llama, merge, recipe, esmerge):
    folder = merge({**recipe, "coefficients": "uniform"})
    coefficients = load_file(folder / "coefficients.safetensors")
    del coefficients["alpha"]
    with safe_open(folder / "coefficients.safetensors", "pt") as stored:
        metadata = stored.metadata()
    save_file(coefficients, folder / "coefficients.safetensors", metadata)
    code, _, err = esmerge("inspect", folder)
    assert code == 2 and "no layer-wise coefficients" in err


def test_inspect_of_a_folder_that_is_not_there(esmerge, tmp_path):
    code, _, err = esmerge("inspect", tmp_path / "nowhere")
    assert (code, err) == (2, f"esmerge: the folder {tmp_path / 'nowhere'} does not exist.\n")


def test_debug_shows_the_traceback(inputs, esmerge_program, tmp_path):
    inputs.recipe["base"] = "./nowhere"
    command = [esmerge_program, "merge", inputs.save_recipe(), "-o", tmp_path / "merged"]
    plain, debug = (
        subprocess.run([*command, *options], capture_output=True, text=True, check=False)
        for options in ((), ("--debug",))
    )
    assert plain.returncode == 2
    assert plain.stderr.count("\n") == 1
    assert debug.returncode != 0
    assert "Traceback" in debug.stderr
    assert "InputError" in debug.stderr


@pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], check=False).returncode != 0,
    reason="needs to mount a small disk in a namespace of its own",
)
@pytest.mark.parametrize("size", ["8k", "64k"], ids=["full at once", "full in the middle"])
def test_full_disk(inputs, esmerge_program, tmp_path, size):
    disk = tmp_path / "disk"
    disk.mkdir()
    script = """
        mount -t tmpfs -o size="$1" tmpfs "$2" && "$3" merge "$4" --quiet -o "$2/merged"
        code=$?
        ls -A "$2"
        exit $code
    """
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", size, disk, esmerge_program, inputs.save_recipe()],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("esmerge: the disk is full; nothing was written")
    assert done.stderr.count("\n") == 1
    assert not done.stdout, "something was left on the disk"


def test_interrupted_merge(inputs, esmerge_program, tmp_path):
    """A probe that takes minutes; the signal comes when its progress bar shows."""
    mask = torch.zeros(4000, 40, dtype=torch.bool)
    mask[:, -1] = True
    inputs.to_tensors(
        inputs_embeds=torch.randn(4000, 40, 32),
        attention_mask=torch.ones(4000, 40, dtype=torch.int64),
        **{f"mask.{name}": mask.clone() for name in inputs.recipe["specialists"]},
    )
    command = [esmerge_program, "merge", inputs.save_recipe(), "-o", tmp_path / "merged"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        shown = b""
        while b"embedding signals" not in shown:
            byte = process.stderr.read(1)
            assert byte, shown.decode()
            shown += byte
        assert any(path.name.startswith(".merged") for path in tmp_path.iterdir()), "the merge is under way"
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read().decode()
    assert process.returncode == 130
    assert "Traceback" not in rest
    assert rest.splitlines()[-1] == "esmerge: interrupted; nothing was written."
    assert [path.name for path in tmp_path.iterdir()] == ["inputs"]


MOUNTS = pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], check=False).returncode != 0,
    reason="needs to mount a disk in a namespace of its own",
)


@MOUNTS
@pytest.mark.parametrize("command", ["merge", "compare"])
def test_read_only_output(inputs, esmerge_program, tmp_path, command):
    disk = tmp_path / "disk"
    disk.mkdir()
    inputs.recipe["coefficients"] = "uniform"
    options = ["--method=linear", "--method=ties"] if command == "compare" else []
    script = """
        mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" || exit 99
        program=$2 output=$1/merged; shift 2
        exec "$program" "$@" --quiet -o "$output"
    """
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", disk, esmerge_program, command, inputs.save_recipe(), *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr == f"esmerge: the output {disk}/merged cannot be written (Read-only file system).\n"
    assert not list(disk.iterdir())


@MOUNTS
@pytest.mark.parametrize("command", ["merge", "compare"])
def test_disk_without_room_for_a_full_checkpoint(inputs, esmerge_program, tmp_path, command):
    """Is found out before anything is measured, merged or written."""
    disk = tmp_path / "disk"
    disk.mkdir()
    to_full(inputs)
    inputs.recipe["coefficients"] = "uniform"
    size = (inputs / "base" / "model.safetensors").stat().st_size
    options = ["--method=linear", "--method=ties"] if command == "compare" else []
    script = """
        mount -t tmpfs -o size="$1" tmpfs "$2" || exit 99
        program=$3 disk=$2; shift 3
        "$program" "$@" --quiet -o "$disk/new/merged"
        code=$?
        ls -A "$disk"
        exit $code
    """
    room = size * 3 // 2 if command == "compare" else size // 2
    merge = [esmerge_program, command, inputs.save_recipe(), *options]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", str(room), disk, *merge],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"esmerge: the output {disk}/new/merged needs 0.00 GB, and its disk has 0.00 GB free")
    assert done.stderr.count("\n") == 1
    assert not done.stdout, "something was left on the disk"


def test_room_that_just_suffices(inputs, esmerge, tmp_path, monkeypatch):
    inputs.recipe |= {"coefficients": "uniform", "output": {"format": "full", "dtype": "bfloat16"}}
    needed = sum(tensor.numel() * 2 for tensor in load_file(inputs / "base" / "model.safetensors").values())
    command = ["merge", inputs.save_recipe(), "--quiet", "-o", tmp_path / "merged"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(needed, 1, needed - 1))
    code, _, err = esmerge(*command)
    assert code == 2 and err.endswith("free some space or choose another output.\n")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(needed, 0, needed))
    code, _, err = esmerge(*command)
    assert (code, err) == (0, "")


def test_limit_on_the_size_of_files(inputs, esmerge_program, tmp_path):
    inputs.recipe |= {"coefficients": "uniform", "output": {"format": "full"}}
    size = (inputs / "base" / "model.safetensors").stat().st_size
    command = [esmerge_program, "merge", inputs.save_recipe(), "--quiet", "-o", tmp_path / "merged"]
    done = subprocess.run(["prlimit", f"--fsize={size // 2}", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "nothing was written" in done.stderr
    assert "ulimit -f" in done.stderr
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["inputs"]


class TestWarnings:
    """What is odd but may be meant: the merge is done, and a sentence says what was found."""

    @pytest.mark.parametrize("output", ["full", "adapter"])
    @pytest.mark.parametrize("method", ["linear", "ties"])
    def test_specialist_identical_to_the_base(self, inputs, esmerge, tmp_path, caplog, output, method):
        model = AutoModelForCausalLM.from_pretrained(inputs / "base", dtype=torch.float32)
        shutil.rmtree(inputs / "cell")
        model.save_pretrained(inputs / "cell")
        inputs.recipe |= {"coefficients": "uniform", "method": method}
        inputs.recipe["output"] = {"format": "full"} if output == "full" else {"rank": 4}
        code, _, err = esmerge("merge", inputs.save_recipe(), "-o", tmp_path / "merged", "--quiet")
        assert code == 0, err
        sentences = [record.getMessage() for record in caplog.records]
        assert sentences == ["specialist cell is identical to the base: its delta is zero everywhere"]

    def test_full_checkpoint_of_another_model(self, inputs, esmerge, tmp_path, caplog):
        config = AutoConfig.from_pretrained(inputs / "base")
        torch.manual_seed(99)
        shutil.rmtree(inputs / "cell")
        AutoModelForCausalLM.from_config(config).save_pretrained(inputs / "cell")
        inputs.recipe |= {"coefficients": "uniform", "output": {"format": "full"}}
        code, _, err = esmerge("merge", inputs.save_recipe(), "-o", tmp_path / "merged", "--quiet")
        assert code == 0, err
        [sentence] = [record.getMessage() for record in caplog.records]
        assert sentence.startswith("cell is as far from the base as an unrelated model is (relative distance ")

    def test_adapter_that_was_never_trained(self, inputs, esmerge, tmp_path, caplog):
        def untrain(tensors):
            for name, tensor in tensors.items():
                if "lora_B" in name:
                    tensor.zero_()

        inputs.change_tensors("cell/adapter_model.safetensors", untrain)
        inputs.recipe["coefficients"] = "uniform"
        code, _, err = esmerge("merge", inputs.save_recipe(), "-o", tmp_path / "merged", "--quiet")
        assert code == 0, err
        sentences = [record.getMessage() for record in caplog.records]
        assert sentences == ["specialist cell is identical to the base: its delta is zero everywhere"]

    def test_identical_specialists(self, inputs, esmerge, tmp_path, caplog):
        shutil.rmtree(inputs / "cell")
        shutil.copytree(inputs / "molecule", inputs / "cell")
        inputs.recipe["coefficients"] = "uniform"
        code, _, err = esmerge("merge", inputs.save_recipe(), "-o", tmp_path / "merged", "--quiet")
        assert code == 0, err
        sentences = [record.getMessage() for record in caplog.records]
        assert sentences == ["molecule and cell are the same specialist: its delta counts twice"]

    def test_identical_adapters_stored_in_different_ways(self, inputs, esmerge, tmp_path, caplog):
        """The same factors under other names, in a folder with other files in it."""
        shutil.rmtree(inputs / "cell")
        shutil.copytree(inputs / "molecule", inputs / "cell")
        inputs.change_json("cell/adapter_config.json", lora_dropout=0.1, base_model_name_or_path="elsewhere")
        tensors = load_file(inputs / "cell" / "adapter_model.safetensors")
        renamed = {name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors.items()}
        save_file(renamed, inputs / "cell" / "adapter_model.safetensors", metadata={"format": "pt", "x": "y"})
        inputs.change_json("protein/adapter_config.json", base_model_name_or_path="elsewhere")
        inputs.change_json("molecule/adapter_config.json", base_model_name_or_path="elsewhere")
        inputs.recipe["coefficients"] = "uniform"
        code, _, err = esmerge("merge", inputs.save_recipe(), "-o", tmp_path / "merged", "--quiet")
        assert code == 0, err
        sentences = [record.getMessage() for record in caplog.records]
        assert sentences == ["molecule and cell are the same specialist: its delta counts twice"]

    def test_equal_factors_with_other_scalings_are_no_twins(self, inputs, esmerge, tmp_path, caplog):
        shutil.rmtree(inputs / "cell")
        shutil.copytree(inputs / "molecule", inputs / "cell")
        inputs.change_json("cell/adapter_config.json", lora_alpha=2)
        inputs.recipe["coefficients"] = "uniform"
        code, _, err = esmerge("merge", inputs.save_recipe(), "-o", tmp_path / "merged", "--quiet")
        assert code == 0, err
        assert not caplog.records

    @pytest.mark.parametrize("method", ["linear", "ties"])
    def test_identical_full_checkpoints_in_different_shards(self, inputs, esmerge, tmp_path, caplog, method):
        to_full(inputs)
        shutil.rmtree(inputs / "molecule")
        model = AutoModelForCausalLM.from_pretrained(inputs / "cell", dtype=torch.float32)
        model.save_pretrained(inputs / "molecule", max_shard_size="20KB")
        assert len(list((inputs / "molecule").glob("*.safetensors"))) > 2
        inputs.recipe |= {"coefficients": "uniform", "method": method}
        code, _, err = esmerge("merge", inputs.save_recipe(), "-o", tmp_path / "merged", "--quiet")
        assert code == 0, err
        sentences = [record.getMessage() for record in caplog.records]
        assert sentences == ["molecule and cell are the same specialist: its delta counts twice"]

    def test_none_without_cause(self, inputs, esmerge, tmp_path, caplog):
        to_full(inputs)
        code, _, err = esmerge("merge", inputs.save_recipe(), "-o", tmp_path / "merged", "--quiet")
        assert code == 0, err
        assert not caplog.records
