"""What is wrong with an evaluation is said in one sentence, before anything is written."""

import json
import re
import shutil

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel


def fails(esmerge, *arguments):
    code, _, err = esmerge("evaluate", *arguments, "--quiet")
    assert code == 2, err
    said = [line for line in err.splitlines() if line.startswith("esmerge:")]
    assert len(said) == 1
    return said[0]


@pytest.mark.parametrize(
    ("options", "culprit", "remedy"),
    [
        (["--score", "guess"], "--score is 'guess'", "likelihood or generate"),
        (["--normalise", "bytes"], "--normalise is 'bytes'", "tokens or characters"),
        (["--batch-size", "0"], "--batch-size is '0'", "at least 1"),
        (["--dtype", "int8"], "--dtype is 'int8'", "float32"),
        (["--strategy", "fsdp2"], "--strategy is 'fsdp2'", "ddp or fsdp"),
        (["--devices", "6", "--accelerator", "cpu"], "--devices 6", "at most 5"),
        (["--accelerator", "abacus"], "--accelerator abacus", "choose others"),
        (["--accelerator", "cuda"], "--accelerator cuda", "choose others"),
        (["--logger", "paper"], "--logger paper", "csv, tensorboard, wandb"),
        (["--chat-template", "nowhere.jinja"], "nowhere.jinja cannot be read", "Jinja"),
        (["--task", "b3bd"], "b3bd; did you mean b3db?", "of your own"),
        (["--task", "other/toy.yaml"], "other/toy.yaml", "cannot be read"),
    ],
)
def test_options(esmerge, text_model, write_task, options, culprit, remedy):
    said = fails(esmerge, text_model, "--task", write_task(5), *options)
    assert culprit in said
    assert remedy in said
    assert not (text_model / "results").exists()


def test_the_same_task_twice(esmerge, text_model, write_task):
    assert "the same name" in fails(esmerge, text_model, "--task", write_task(5), "--task", write_task(5))


def test_no_task_and_two_models(esmerge, text_model, write_task):
    assert "--task is missing" in fails(esmerge, text_model)
    assert "--compare" in fails(esmerge, text_model, text_model, "--task", write_task(5))


def test_no_tokenizer(esmerge, text_model, write_task):
    for file in text_model.glob("tokenizer*"):
        file.unlink()
    said = fails(esmerge, text_model, "--task", write_task(5))
    assert f"{text_model} has no tokenizer" in said and "save_pretrained" in said


@pytest.mark.parametrize("changes", [{"hidden_size": 24}, {"model_type": "gpt2"}])
def test_a_base_that_the_adapter_was_not_trained_on(esmerge, llama, write_task, tmp_path, changes):
    adapter = shutil.copytree(llama / "molecule", tmp_path / "adapter")
    other = shutil.copytree(llama / "base", tmp_path / "other")
    (other / "model.safetensors").unlink()
    if "model_type" in changes:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2))
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(other, **changes))
    model.save_pretrained(other)
    said = fails(esmerge, adapter, "--base", other, "--task", write_task(5))
    assert f"the adapter {adapter} does not fit the base {other}" in said


@pytest.mark.parametrize("lost", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_model_without_one_of_its_tensors(esmerge, text_model, write_task, lost):
    weights = load_file(text_model / "model.safetensors")
    del weights[lost]
    save_file(weights, text_model / "model.safetensors", metadata={"format": "pt"})
    assert f"{text_model} has no {lost}" in fails(esmerge, text_model, "--task", write_task(5))


@pytest.mark.parametrize("change", [{"model_type": "brand_new"}, {"model_type": "t5"}, {"hidden_size": 64}])
def test_what_transformers_cannot_load(esmerge, text_model, write_task, change):
    config = json.loads((text_model / "config.json").read_text())
    (text_model / "config.json").write_text(json.dumps(config | change))
    assert str(text_model) in fails(esmerge, text_model, "--task", write_task(5))


@pytest.mark.parametrize("spoilt", ["renamed", "in part"])
def test_an_adapter_whose_tensors_have_no_place(esmerge, llama, write_task, tmp_path, spoilt):
    adapter = shutil.copytree(llama / "molecule", tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    if spoilt == "renamed":
        weights = {name.replace(".layers.", ".language_model.layers."): own for name, own in weights.items()}
    else:
        weights = {name: own for name, own in weights.items() if "layers.1." not in name}
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    said = fails(esmerge, adapter, "--base", llama / "base", "--task", write_task(5))
    place = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
    if spoilt == "renamed":
        assert "has base_model.model.model.language_model.layers.0" in said
        assert f"as in {place.replace('layers.1', 'layers.0')}" in said
    else:
        assert f"the adapter {adapter} has no {place}, " in said


def test_an_adapter_without_a_module_that_it_saves_whole(esmerge, llama, write_task, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(llama / "base")
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"])
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    kept = {name: own for name, own in load_file(file).items() if "lm_head" not in name}
    save_file(kept, file, metadata={"format": "pt"})
    said = fails(esmerge, tmp_path / "adapter", "--base", llama / "base", "--task", write_task(5))
    assert "has no base_model.model.lm_head" in said and "save it whole" in said


def test_an_adapter_that_is_none_of_weights(esmerge, llama, write_task, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(llama / "base")
    get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).save_pretrained(
        tmp_path / "a"
    )
    shutil.copytree(
        llama / "base",
        tmp_path / "a",
        ignore=lambda _, names: [n for n in names if "token" not in n],
        dirs_exist_ok=True,
    )
    said = fails(esmerge, tmp_path / "a", "--base", llama / "base", "--task", write_task(5))
    assert "virtual tokens before prompts (PROMPT_TUNING)" in said


def test_no_model(esmerge, text_model, llama, write_task, tmp_path):
    assert "does not exist" in fails(esmerge, tmp_path / "nowhere", "--task", write_task(5))
    (text_model / "config.json").unlink()
    assert "it holds no model" in fails(esmerge, text_model, "--task", write_task(5))
    adapter = shutil.copytree(llama / "molecule", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    assert "give the base" in fails(esmerge, adapter, "--task", write_task(5))


def test_what_the_model_does_not_have(esmerge, text_model, write_task):
    said = fails(esmerge, text_model, "--task", write_task(5), "--as-text", "molecul")
    assert "molecul is a modality of neither the model nor a task; did you mean molecule?" in said


@pytest.mark.parametrize("score", ["likelihood", "generate"])
@pytest.mark.parametrize(
    ("dtype", "remedy"), [("float16", "use --dtype bfloat16 or float32"), ("float32", "look for NaN among the weights")]
)
def test_no_answers_are_made_of_nan(esmerge, text_model, write_task, score, dtype, remedy):
    weights = load_file(text_model / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, text_model / "model.safetensors", metadata={"format": "pt"})
    said = fails(esmerge, text_model, "--task", write_task(5), "--dtype", dtype, "--score", score)
    assert re.search(rf"the sample test-\d of toy are NaN in {dtype}: {remedy}", said)
    assert not (text_model / "results" / "toy.json").exists()


def test_samples_that_a_table_of_positions_does_not_reach(esmerge, text_model, write_task, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(text_model)
    config = GPT2Config(n_positions=24, n_embd=16, n_layer=1, n_head=2, vocab_size=len(tokenizer))
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    said = fails(esmerge, tmp_path / "gpt2", "--task", write_task(5))
    assert re.search(r"5 of the 5 samples of toy are up to \d+ tokens long .* more than the 24 positions", said)
    assert "a longer context" in said


def test_choices_that_the_likelihood_cannot_tell_apart(esmerge, text_model, write_task):
    task = write_task(5, choices=["Yes", "Yes, but"], labels={1: "Yes", 0: "Yes, but"})
    said = fails(esmerge, text_model, "--task", task)
    assert "'Yes, but' begins with all tokens of 'Yes'" in said
    assert "--normalise tokens" in said
    code, _, err = esmerge("evaluate", text_model, "--task", task, "--quiet", "--normalise", "tokens")
    assert code == 0, err


def test_choices_that_are_the_same_tokens(esmerge, text_model, write_task):
    # The tokenizer of some models folds what differs here.
    file = text_model / "tokenizer.json"
    content = json.loads(file.read_text())
    content["normalizer"] = {"type": "Replace", "pattern": {"String": "maybe"}, "content": "Yes"}
    file.write_text(json.dumps(content))
    task = write_task(5, choices=["Yes", "maybe"], labels={1: "Yes", 0: "maybe"})
    assert "'Yes' and 'maybe' are the same tokens" in fails(esmerge, text_model, "--task", task)


def test_a_chat_template_that_does_not_work(esmerge, text_model, write_task, tmp_path):
    (tmp_path / "bad.jinja").write_text("{{ raise_exception('no user turns') }}")
    said = fails(esmerge, text_model, "--task", write_task(5), "--chat-template", tmp_path / "bad.jinja")
    assert "no user turns" in said


def test_results_are_no_file(esmerge, text_model, write_task, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file" in fails(esmerge, text_model, "--task", write_task(5), "-o", tmp_path / "file")
