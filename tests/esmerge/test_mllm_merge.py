"""Specialists with encoders: soft tokens in the probe, encoders in the result, which loads in one call."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from esmerge.mllm import MllmForConditionalGeneration
from esmerge.mllm.loading import load_model
from esmerge.pipeline import compare
from esmerge.pipeline import merge as run_merge
from esmerge.recipe import parse_recipe


@pytest.fixture(scope="module")
def specialists(multimodal):
    return multimodal


@pytest.fixture
def merge(specialists, tmp_path, monkeypatch):
    """A function that merges a recipe mapping and returns the output folder."""
    monkeypatch.setenv("ESMERGE_ENCODER_CACHE", str(tmp_path / "soft_tokens"))

    def merge(content, name="merged"):
        counts = run_merge(parse_recipe(content, specialists), tmp_path / name, progress=False)
        assert counts["encoders"] == sum(
            len(load_file(file)) for file in specialists.glob("*/modalities/*/model.safetensors")
        )
        return tmp_path / name

    return merge


def prompt(processor):
    return processor(
        text=["<mol> and <protein> in <cell>?", "<protein> <mol> <mol>"],
        molecule=["CCO", "C#N", "c1ccccc1"],
        protein=["MKTAYIAK", "GSH"],
        cell=["CD3D"],
    )


@pytest.mark.parametrize("output", ["adapter", "full"])
@pytest.mark.parametrize("coefficients", ["uniform", {"from": "embedding_signals", "projections": 32}])
def test_merged_model_has_all_encoders_and_loads_in_one_call(specialists, merge, recipe, output, coefficients):
    folder = merge({**recipe, "coefficients": coefficients, "output": {"format": output}})
    model, processor = load_model(folder, specialists / "base" if output == "adapter" else None, dtype=torch.float32)
    for name in ("molecule", "protein"):
        stored = load_file(specialists / name / "modalities" / name / "model.safetensors")
        assert stored.keys() <= dict(model.encoders[name].state_dict()).keys()
        for key, tensor in stored.items():
            assert torch.equal(model.encoders[name].state_dict()[key], tensor), key
    inputs = prompt(processor)
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.isfinite().all()
    assert model.generate(**inputs, max_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3


def test_name_of_the_output_is_in_none_of_its_files(merge, recipe):
    recipe |= {"coefficients": "uniform", "output": {"format": "full"}}
    first, second = merge(recipe, "first"), merge(recipe, "second")
    for file in first.rglob("*"):
        assert file.is_dir() or file.read_bytes() == (second / file.relative_to(first)).read_bytes(), file


def test_adapter_and_full_model_agree(specialists, merge, recipe):
    recipe["coefficients"] = "uniform"
    adapter = load_model(merge(recipe, "adapter"), specialists / "base", dtype=torch.float32)
    full = load_model(merge({**recipe, "output": {"format": "full"}}, "full"), dtype=torch.float32)
    logits = []
    for model, processor in (adapter, full):
        with torch.no_grad():
            logits.append(model(**prompt(processor)).logits[:, -1])
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_llm_part_is_that_of_the_same_merge_without_encoders(llama, specialists, merge, recipe, tmp_path):
    recipe["coefficients"] = "uniform"
    plain = tmp_path / "plain"
    run_merge(parse_recipe(recipe, llama), plain, progress=False)
    assert (merge(recipe) / "adapter_model.safetensors").read_bytes() == (
        plain / "adapter_model.safetensors"
    ).read_bytes()
    base = AutoModelForCausalLM.from_pretrained(llama / "base")
    PeftModel.from_pretrained(base, tmp_path / "merged")  # still an adapter like any other
    full = {**recipe, "output": {"format": "full"}}
    run_merge(parse_recipe(full, llama), tmp_path / "plain-full", progress=False)
    expected = load_file(tmp_path / "plain-full" / "model.safetensors")
    found = load_file(merge(full, "mllm-full") / "model.safetensors")
    llm = {key.removeprefix("language_model."): value for key, value in found.items() if "encoders." not in key}
    assert llm.keys() == expected.keys()
    assert all(torch.equal(llm[key], expected[key]) for key in expected)


def test_full_model_is_a_transformers_model(specialists, merge, recipe, tmp_path):
    folder = merge({**recipe, "coefficients": "uniform", "output": {"format": "full"}})
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(model) is MllmForConditionalGeneration
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert not list(folder.rglob("*.py"))


def test_probe_of_items_is_the_probe_of_their_soft_tokens(specialists, modality_settings, merge, recipe, tmp_path):
    """The same merge from a file with the embeddings that the specialists' own models give."""
    recipe["probe"]["chat_template"] = "{{ messages[0]['content'] }}"
    recipe["probe"]["template"] = "M {molecule} P {protein} C@{cell}@"
    recipe["probe"]["batch_size"] = 1
    recipe["output"] = {"signals": True}
    items = merge(recipe, "items")

    model, processor = load_model(items, specialists / "base", dtype=torch.float32)
    texts = {name: (specialists / f"{name}.txt").read_text().split("\n")[:5] for name in modality_settings}
    rows, masks = [], {name: [] for name in modality_settings}
    for molecule, protein, cell in zip(*texts.values(), strict=True):
        inputs = processor(
            text=f"M <mol> P <protein> C@{cell}@", molecule=[molecule], protein=[protein], add_special_tokens=False
        )
        ids = inputs["input_ids"][0]
        features = {
            name: {k.removeprefix(f"{name}_"): v for k, v in inputs.items() if k.startswith(f"{name}_")}
            for name in ("molecule", "protein")
        }
        rows.append(model.embed_inputs(inputs["input_ids"], features)[0].detach())
        for name, token_id in processor.placeholder_ids.items():
            masks[name].append(ids == token_id)
        start = processor(
            text="M <mol> P <protein> C@", molecule=[molecule], protein=[protein], add_special_tokens=False
        )["input_ids"].shape[1]
        # No token joins the sign before and after the cell with anything else.
        masks["cell"].append((torch.arange(len(ids)) >= start) & (torch.arange(len(ids)) < len(ids) - 1))
    assert sum(int(mask.sum()) for mask in masks["protein"]) == 5 * 8, "every protein is cut to 6 residues"
    length = max(map(len, rows))
    attention = torch.stack([torch.arange(length) >= length - len(row) for row in rows])

    def left(tensor):
        return torch.cat([tensor.new_zeros(length - len(tensor), *tensor.shape[1:]), tensor])

    save_file(
        {
            "inputs_embeds": torch.stack([left(row) for row in rows]),
            "attention_mask": attention.long(),
            **{f"mask.{name}": torch.stack([left(mask) for mask in own]) for name, own in masks.items()},
        },
        tmp_path / "probe.safetensors",
    )
    recipe["probe"] = {"tensors": str(tmp_path / "probe.safetensors"), "batch_size": 1}
    ready = merge(recipe, "ready")
    found, expected = (load_file(folder / "coefficients.safetensors") for folder in (items, ready))
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-6)


def test_soft_tokens_are_kept_for_the_next_merge(specialists, merge, recipe, tmp_path):
    first = merge(recipe, "first")
    kept = sorted((tmp_path / "soft_tokens").rglob("*.safetensors"))
    assert len(kept) == 10
    times = [file.stat().st_mtime_ns for file in kept]
    second = merge(recipe, "second")
    assert [file.stat().st_mtime_ns for file in kept] == times
    name = "adapter_model.safetensors"
    assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.parametrize("output", ["adapter", "full"])
def test_text_modalities_alone_leave_a_plain_folder(specialists, merge, recipe, tmp_path, output):
    for name in ("molecule", "protein"):
        shutil.copytree(specialists / "cell", tmp_path / name)
        (tmp_path / name / "modalities" / "cell").rename(tmp_path / name / "modalities" / name)
        settings = {"kind": "text", "placeholder": f"<{name}>"}
        (tmp_path / name / "modalities" / name / "config.json").write_text(json.dumps(settings))
        recipe["specialists"][name] = {"model": str(tmp_path / name)}
    recipe |= {"coefficients": "uniform", "output": {"format": output}}
    run_merge(parse_recipe(recipe, specialists), tmp_path / "merged", progress=False)
    if output == "adapter":
        base = AutoModelForCausalLM.from_pretrained(specialists / "base")
        PeftModel.from_pretrained(base, tmp_path / "merged")
    else:
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")).__name__ == "LlamaForCausalLM"
    _, processor = load_model(tmp_path / "merged", specialists / "base" if output == "adapter" else None)
    inputs = processor(text="<protein>!", protein=["MKT"])
    assert processor.tokenizer.decode(inputs["input_ids"][0]) == "MKT!"


@pytest.mark.parametrize("output", ["adapter", "full"])
def test_every_result_of_a_comparison_has_the_encoders(specialists, recipe, tmp_path, monkeypatch, output):
    monkeypatch.setenv("ESMERGE_ENCODER_CACHE", str(tmp_path / "soft_tokens"))
    recipe["output"] = {"format": output} | ({"rank": 12} if output == "adapter" else {})
    variants = {"linear": {"method": "linear"}, "ties": {"method": "ties", "coefficients": "uniform"}}
    compare(parse_recipe(recipe, specialists), variants, tmp_path / "compared", progress=False)
    for name in variants:
        base = specialists / "base" if output == "adapter" else None
        model, processor = load_model(tmp_path / "compared" / name, base, dtype=torch.float32)
        for modality in ("molecule", "protein"):
            stored = load_file(specialists / modality / "modalities" / modality / "model.safetensors")
            found = model.encoders[modality].state_dict()
            assert found.keys() == stored.keys() and all(torch.equal(found[key], stored[key]) for key in stored)
        with torch.no_grad():
            assert model(**prompt(processor)).logits.isfinite().all()


def test_loads_in_one_call_in_a_process_of_its_own(specialists, merge, recipe):
    """`from esmerge import load_model`, from an adapter that names its base."""
    folder = merge(recipe | {"base": str(specialists / "base"), "coefficients": "uniform"})
    program = (
        "import sys; from esmerge import load_model; model, processor = load_model(sys.argv[1]); "
        "print(model.generate(**processor(text='<mol>', molecule=['CCO']), max_new_tokens=2).shape[1])"
    )
    done = subprocess.run([sys.executable, "-c", program, folder], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "5", done.stderr
