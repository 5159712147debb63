"""Merging on a device that is not the CPU gives what it gives on the CPU, and no tensors of both meet."""

import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from esmerge.methods import METHODS
from esmerge.pipeline import merge
from esmerge.recipe import parse_recipe

NAMES = ("molecule", "protein", "cell")
EQUAL = dict.fromkeys(NAMES, 1.0)
MATCHING = {"method": {"name": "embedding_matching", "activations": "merged"}, "coefficients": EQUAL}


def fields_of(name):
    """What a method needs beside its name."""
    if METHODS[name].match:
        return {"method": name, "coefficients": EQUAL}
    return {"method": name, "coefficients": "uniform", "probe": None} if name == "slerp" else {"method": name}


# By name: the fixture whose specialists are merged, and how.
MERGES = {
    **{f"{name}-full": ("llama", fields_of(name) | {"output": {"format": "full"}}) for name in METHODS},
    "adapter": ("llama", {}),
    "factors": ("llama", {"space": "factors"}),
    "layer": ("llama", {"coefficients": {"from": "embedding_signals", "granularity": "layer", "projections": 32}}),
    "merged-layers": ("llama", MATCHING),
    "encoders": ("multimodal", {}),
    "dora": ("dora", {"output": {"format": "full"}}),
    "dora-merged-layers": ("dora", MATCHING | {"output": {"format": "full"}}),
}


@pytest.fixture(scope="module")
def dora(llama, make_adapter, tmp_path_factory):
    """Specialists whose deltas are not low-rank factors alone: magnitudes, norms, rows of embeddings, biases."""
    folder = shutil.copytree(llama, tmp_path_factory.mktemp("dora") / "specialists")
    settings = {
        "molecule": {"use_dora": True, "target_modules": ["q_proj", "down_proj"]},
        "protein": {"target_modules": ["v_proj"], "modules_to_save": ["norm", "input_layernorm", "up_proj"]},
        "cell": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7]},
    }
    for seed, (name, own) in enumerate(settings.items()):
        shutil.rmtree(folder / name)
        make_adapter(folder / "base", folder / name, seed, r=4, **own)
    return folder


@pytest.fixture
def recipe_of(request, recipe):
    """A function that gives the recipe of a merge, and the folder that its paths are relative to."""

    def make(name):
        folder, changes = MERGES[name]
        made = {field: value for field, value in (recipe | changes).items() if value is not None}
        if made.get("method") == "slerp":
            made["specialists"] = {own: recipe["specialists"][own] for own in NAMES[:2]}
        return made, request.getfixturevalue(folder)

    return make


@pytest.fixture(scope="module")
def merged_there(tmp_path_factory):
    """The folder for what is merged on the other device."""
    return tmp_path_factory.mktemp("there")


def test_all_of_them_merge(recipe_of, merged_there, run_on_other_device):
    commands = []
    for name in MERGES:
        content, folder = recipe_of(name)
        file = folder / f"on other device, {name}.yaml"
        file.write_text(yaml.safe_dump(content | {"device": "other"}))
        commands.append(["merge", file, "-o", merged_there / name, "--quiet"])
    assert run_on_other_device(*commands) > 100 * len(commands)


def weights_of(folder):
    """Of an adapter, the products of its factors: these themselves may differ in signs."""
    found = {name: tensor for file in folder.glob("*model*.safetensors") for name, tensor in load_file(file).items()}
    pairs = {name: name.replace("lora_A", "lora_B") for name in found if "lora_A" in name}
    return {name: found[b] @ found[name] for name, b in pairs.items()} or found


@pytest.mark.parametrize("name", MERGES)
def test_the_result_is_that_of_the_cpu(recipe_of, merged_there, tmp_path, name):
    content, folder = recipe_of(name)
    merge(parse_recipe(content, folder), tmp_path / "here", progress=False)
    there, here = weights_of(merged_there / name), weights_of(tmp_path / "here")
    if METHODS[parse_recipe(content, folder).method.name].random:
        # Another device draws other numbers.
        assert there.keys() == here.keys() and any(not torch.equal(there[key], here[key]) for key in here)
        return
    torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-5)
