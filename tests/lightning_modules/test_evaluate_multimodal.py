"""Models with encoders, evaluated end to end: items go through them, in any batch and on any number of devices."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from esmerge.mllm import MllmProcessor
from esmerge.mllm.loading import assemble, load_model
from esmerge.modalities import modality_from_settings
from esmerge.modalities.registry import MODALITIES_FOLDER, save_encoder
from lightning_modules.samples import load_samples
from lightning_modules.tasks import load_task

PROTEINS = ["MKTAYIAK", "GSHMLEDP", "KK", "MALWMRLLPLACDEFG", "MKTAYIAK"]


@pytest.fixture
def multimodal(llama, modality_settings, tmp_path):
    """A folder with an LLM that has encoders for molecules and proteins, and cells as text."""
    torch.manual_seed(0)
    modalities = {name: modality_from_settings(settings, name) for name, settings in modality_settings.items()}
    encoders = {name: modalities[name].build(32).eval() for name in ("molecule", "protein")}
    llm = AutoModelForCausalLM.from_pretrained(llama / "base", dtype=torch.float32)
    processor = MllmProcessor(AutoTokenizer.from_pretrained(llama / "base"), modalities)
    assemble(llm, processor, encoders).save_pretrained(tmp_path / "multimodal")
    processor.save_pretrained(tmp_path / "multimodal")
    return tmp_path / "multimodal"


@pytest.fixture
def pairs(write_task, tmp_path):
    """A task about molecules and proteins, each protein with several molecules."""
    file = write_task(
        23,
        columns={"molecule": "smiles", "protein": "sequence"},
        prompt="Protein: {protein}\nMolecule: {molecule}\nDoes it dissolve?",
    )
    table = tmp_path / "toy.csv"
    header, *rows = table.read_text().splitlines()
    rows = [f"{row},{PROTEINS[number % 5]}" for number, row in enumerate(rows)]
    table.write_text("\n".join([f"{header},sequence", *rows]) + "\n")
    return file


def plain_scores(model, processor, task, sample):
    """The choices' log-likelihoods by model and processor alone, one sequence per choice."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": part.modality, part.modality: part.value}
        for part in sample.turns[0].parts
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True
    )
    start, found = inputs["input_ids"].shape[1], []
    for choice in task.choices:
        ids = processor.tokenizer(choice, add_special_tokens=False, return_tensors="pt")["input_ids"]
        whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], ids], dim=1), "attention_mask": None}
        with torch.no_grad():
            logits = model(**whole).logits[0, start - 1 : -1].log_softmax(dim=-1)
        found.append(logits[torch.arange(ids.shape[1]), ids[0]].sum().item())
    return found


@pytest.mark.parametrize("size", [1, 5, "auto"])
def test_items_go_through_the_encoders(esmerge, multimodal, pairs, results_of, size):
    code, _, err = esmerge("evaluate", multimodal, "--task", pairs, "--quiet", "--batch-size", size)
    assert code == 0, err
    results, log = results_of(multimodal)
    assert results["items"] == {"molecule": "encoder", "protein": "encoder"}
    model, processor = load_model(multimodal)
    task = load_task(str(pairs))
    for record, sample in zip(log, load_samples(task), strict=True):
        expected = plain_scores(model, processor, task, sample)
        assert list(record["log_likelihoods"].values()) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("score", ["likelihood", "generate"])
def test_a_device_that_is_not_the_cpu_gives_the_same(
    esmerge, multimodal, pairs, run_on_other_device, results_of, score
):
    asked = ["evaluate", multimodal, "--task", pairs, "--quiet", "--score", score]
    assert esmerge(*asked)[0] == 0
    _, expected = results_of(multimodal)
    output = multimodal.parent / "there"
    assert run_on_other_device([*asked, "--accelerator", "other", "--output", output]) > 0
    results, log = results_of(output)
    assert results["settings"]["accelerator"] == "other"
    for there, here in zip(log, expected, strict=True):
        likelihoods = [record.pop("log_likelihoods", {}) for record in (there, here)]
        assert likelihoods[0] == pytest.approx(likelihoods[1], rel=1e-5) and there == here


def made_by_transformers(folder, file, limit):
    """The new tokens after each of the first samples, and what decodes them."""
    model, processor = load_model(folder)
    made = []
    for sample in load_samples(load_task(str(file)))[:limit]:
        items = {part.modality: [part.value] for part in sample.turns[0].parts if not isinstance(part, str)}
        parts = (
            p if isinstance(p, str) else processor.modalities[p.modality].placeholder for p in sample.turns[0].parts
        )
        text = processor.apply_chat_template([{"role": "user", "content": "".join(parts)}], add_generation_prompt=True)
        inputs = processor(text=text, add_special_tokens=False, **items)
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        made.append(ids.tolist())
    return made, processor.tokenizer


def test_generated_after_soft_tokens(esmerge, multimodal, pairs, results_of):
    made, tokenizer = made_by_transformers(multimodal, pairs, 6)
    settings = json.loads((multimodal / "generation_config.json").read_text())
    lengths = []
    # An end that stands in generation_config.json alone is one too.
    for ends in (settings["eos_token_id"], [made[0][1]]):
        (multimodal / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": ends}))
        code, _, err = esmerge("evaluate", multimodal, "--task", pairs, "--quiet", "--score", "generate", "--limit", 6)
        assert code == 0, err
        made, tokenizer = made_by_transformers(multimodal, pairs, 6)
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in made]
        assert [record["generated"] for record in results_of(multimodal)[1]] == texts
        lengths.append(len(made[0]))
    assert lengths[1] < lengths[0]


@pytest.mark.parametrize(("score", "strategy"), [("likelihood", "fsdp"), ("generate", "fsdp"), ("generate", "ddp")])
def test_many_devices_give_what_one_gives(esmerge, run_program, multimodal, pairs, tmp_path, score, strategy):
    arguments = ["evaluate", multimodal, "--task", pairs, "--quiet", "--batch-size", 3, "--score", score]
    arguments += ["--accelerator", "cpu"]
    assert esmerge(*arguments, "-o", tmp_path / "one")[0] == 0
    run_program(*arguments, "--devices", 2, "--strategy", strategy, "-o", tmp_path / "two")
    logs = [(tmp_path / name / "results" / "toy.jsonl").read_bytes() for name in ("one", "two")]
    assert logs[0] == logs[1]


def test_an_adapter_with_an_encoder(esmerge, llama, modality_settings, write_task, results_of, tmp_path):
    adapter = shutil.copytree(llama / "molecule", tmp_path / "adapter")
    torch.manual_seed(0)
    modality = modality_from_settings(modality_settings["molecule"], "molecule")
    save_encoder(modality, modality.build(32), adapter / MODALITIES_FOLDER / "molecule")
    file = write_task(7)
    code, _, err = esmerge("evaluate", adapter, "--task", file, "--quiet", "--base", llama / "base")
    assert code == 0, err
    first = results_of(adapter)
    model, processor = load_model(adapter, llama / "base")
    task = load_task(str(file))
    for record, sample in zip(first[1], load_samples(task), strict=True):
        expected = plain_scores(model, processor, task, sample)
        assert list(record["log_likelihoods"].values()) == pytest.approx(expected, abs=1e-5)
    # The encoder counts as a part of the model.
    save_encoder(modality, modality.build(32), adapter / MODALITIES_FOLDER / "molecule")
    esmerge("evaluate", adapter, "--task", file, "--quiet", "--base", llama / "base")
    assert results_of(adapter)[0]["model"]["hash"] != first[0]["model"]["hash"]


def test_a_modality_that_the_model_lacks(esmerge, multimodal, write_task, results_of):
    prompt = "RNA: {rna}\nDoes it dissolve?"
    file = write_task(5, columns={"rna": "smiles"}, modalities=["rna"], prompt=prompt)
    code, _, err = esmerge("evaluate", multimodal, "--task", file, "--quiet")
    assert code == 2
    assert "items of rna, for which the model has no encoder (it has: cell, molecule, protein)" in err
    assert "--as-text rna" in err
    code, _, err = esmerge("evaluate", multimodal, "--task", file, "--quiet", "--as-text", "rna")
    assert code == 0, err
    assert results_of(multimodal)[0]["items"] == {"rna": "text"}


def test_items_as_text_although_there_is_an_encoder(esmerge, multimodal, write_task, results_of, tmp_path):
    file = write_task(5)
    esmerge("evaluate", multimodal, "--task", file, "--quiet")
    esmerge("evaluate", multimodal, "--task", file, "--quiet", "--as-text", "molecule", "-o", tmp_path / "text")
    through_encoder, as_text = results_of(multimodal), results_of(tmp_path / "text")
    assert as_text[0]["items"] == {"molecule": "text"}
    assert as_text[0]["run"]["prompts"] != through_encoder[0]["run"]["prompts"]
    assert as_text[1] != through_encoder[1]


def test_an_item_that_is_not_valid(esmerge, multimodal, write_task, tmp_path):
    file = write_task(5)
    table = tmp_path / "toy.csv"
    table.write_text(table.read_text() + "C1CC,1\n")
    code, _, err = esmerge("evaluate", multimodal, "--task", file, "--quiet")
    assert code == 2
    assert "C1CC" in err
    assert not (multimodal / "results").exists()


def test_a_placeholder_in_a_text(esmerge, multimodal, write_task):
    file = write_task(5, prompt="What is <mol>?\n{molecule}\nDoes it dissolve?")
    code, _, err = esmerge("evaluate", multimodal, "--task", file, "--quiet")
    assert code == 2
    assert "<mol> in it" in err
