"""`esmerge evaluate` on tiny models: what it writes is right, and stays the same however it is run."""

import json
import re
import shutil

import pytest
import torch
import transformers
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_modules import evaluate
from lightning_modules.samples import load_samples
from lightning_modules.tasks import load_task


def plain_scores(model, tokenizer, task, sample):
    """The choices' log-likelihoods by transformers alone: one sequence per choice."""
    messages = [
        {"role": turn.role, "content": "".join(getattr(p, "value", p) for p in turn.parts)} for turn in sample.turns
    ]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    found = []
    for choice in task.choices:
        ids = tokenizer(choice, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([start + ids])).logits[0, len(start) - 1 : -1].log_softmax(dim=-1)
        found.append(sum(logits[place, token].item() for place, token in enumerate(ids)))
    return found


def test_scores_are_those_of_one_sequence_at_a_time(esmerge, text_model, write_task, results_of):
    file = write_task()
    code, out, err = esmerge("evaluate", text_model, "--task", file, "--quiet")
    assert code == 0, err
    results, log = results_of(text_model)
    task, samples = load_task(str(file)), load_samples(load_task(str(file)))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(text_model), AutoTokenizer.from_pretrained(text_model)
    assert [record["id"] for record in log] == [sample.id for sample in samples]
    for record, sample in zip(log, samples, strict=True):
        expected = plain_scores(model, tokenizer, task, sample)
        assert list(record["log_likelihoods"].values()) == pytest.approx(expected, abs=1e-5)
        assert record["prediction"] == task.choices[max(range(2), key=expected.__getitem__)]
        assert record["answer"] == task.choices[sample.answer]
    right = sum(record["prediction"] == record["answer"] for record in log)
    score = results["scores"]["accuracy"]
    assert score["value"] == pytest.approx(right / 23)
    assert score["low"] <= score["value"] <= score["high"]
    assert list(results["scores"]) == ["accuracy", "macro_f1", "mcc", "auroc", "average_precision"]
    assert re.search(rf"accuracy\W+{score['value']:.3f}", out)


def test_results_say_what_was_evaluated(esmerge, text_model, write_task, results_of, tmp_path):
    esmerge("evaluate", text_model, "--task", write_task(), "--quiet", "--limit", 9)
    results, log = results_of(text_model)
    assert results["samples"] == len(log) == 9
    assert sum(results["answers"].values()) == sum(results["predictions"].values()) == 9
    assert results["task"]["title"] == "Solubility"
    assert results["task"]["version"] == 1
    assert results["model"]["name"] == "model"
    assert results["items"] == {"molecule": "text"}
    assert results["versions"]["torch"] == torch.__version__
    assert results["samples_per_second"] > 0
    assert results["esmerge"] is None
    assert str(tmp_path) not in (text_model / "results" / "toy.json").read_text()
    # Nothing else was left there.
    assert sorted(file.name for file in (text_model / "results").iterdir()) == ["toy.json", "toy.jsonl"]


def test_hashes_tell_models_and_prompts_apart(esmerge, text_model, write_task, results_of, tmp_path):
    runs = {}
    other = shutil.copytree(text_model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    (tmp_path / "template.jinja").write_text("{{ messages[0]['content'] }} ->")
    for name, arguments in {
        "first": [text_model],
        "again": [text_model],
        "model": [other],
        "template": [text_model, "--chat-template", tmp_path / "template.jinja"],
        "none": [text_model, "--chat-template", "none"],
    }.items():
        output = tmp_path / f"out-{name}"
        code, _, err = esmerge("evaluate", *arguments, "--task", write_task(), "--quiet", "-o", output)
        assert code == 0, err
        runs[name] = results_of(output)[0]["run"]
    assert runs["first"] == runs["again"]
    assert runs["model"]["model"] != runs["first"]["model"]
    assert runs["model"]["prompts"] == runs["first"]["prompts"]
    assert len({runs[name]["prompts"] for name in ("first", "template", "none")}) == 3
    assert len({runs[name]["chat_template"] for name in ("first", "template", "none")}) == 3


def test_progress_is_shown_and_scores_are_logged(esmerge, text_model, write_task, results_of):
    code, out, err = esmerge("evaluate", text_model, "--task", write_task(), "--logger", "csv")
    assert code == 0, err
    assert "100%" in out + err
    (logged,) = (text_model / "results").rglob("metrics.csv")
    header, row = (line.split(",") for line in logged.read_text().splitlines())
    scores = results_of(text_model)[0]["scores"]
    assert float(row[header.index("toy/accuracy")]) == pytest.approx(scores["accuracy"]["value"])


def test_scores_do_not_depend_on_the_batch_size(esmerge, text_model, write_task, results_of, tmp_path):
    logs = []
    for size in (1, 4, 7, "auto"):
        esmerge(
            "evaluate", text_model, "--task", write_task(), "--quiet", "--batch-size", size, "-o", tmp_path / f"{size}"
        )
        logs.append(results_of(tmp_path / f"{size}")[1])
    for log in logs[1:]:
        for record, other in zip(logs[0], log, strict=True):
            assert record["prediction"] == other["prediction"]
            assert list(record["log_likelihoods"].values()) == pytest.approx(
                list(other["log_likelihoods"].values()), abs=1e-5
            )


@pytest.mark.parametrize("score", ["likelihood", "generate"])
@pytest.mark.parametrize("kind", ["MambaConfig", "RwkvConfig"])
def test_recurrent_models_are_not_padded(esmerge, text_model, make_base, write_task, results_of, tmp_path, kind, score):
    tokenizer = AutoTokenizer.from_pretrained(text_model)
    config = getattr(transformers, kind)(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2)
    tokenizer.save_pretrained(make_base(config, tmp_path / "model-of-its-own"))
    logs = []
    for size in (1, 4, "auto"):
        place = tmp_path / f"{size}"
        code, _, err = esmerge(
            "evaluate",
            tmp_path / "model-of-its-own",
            "--task",
            write_task(9),
            "--quiet",
            "--score",
            score,
            "--batch-size",
            size,
            "-o",
            place,
        )
        assert code == 0, err
        logs.append(results_of(place)[1])
    for log in logs[1:]:
        for record, other in zip(logs[0], log, strict=True):
            assert record.get("generated") == other.get("generated")
            found, expected = (list(own.get("log_likelihoods", {}).values()) for own in (record, other))
            assert found == pytest.approx(expected, abs=1e-4)


def test_normalised_by_length(esmerge, text_model, write_task, results_of, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(text_model)
    tokens = [len(tokenizer(choice)["input_ids"]) for choice in ("Yes", "No way")]
    assert tokens[0] != tokens[1]
    for kind, lengths in {"tokens": tokens, "characters": [3, 6]}.items():
        output = tmp_path / kind
        esmerge("evaluate", text_model, "--task", write_task(), "--quiet", "--normalise", kind, "-o", output)
        for record in results_of(output)[1]:
            yes, no = (score / by for score, by in zip(record["log_likelihoods"].values(), lengths, strict=True))
            assert record["prediction"] == ("Yes" if yes > no else "No way")


def test_generated_answers_are_read(esmerge, text_model, write_task, results_of):
    file = write_task(max_new_tokens=5)
    code, _, err = esmerge("evaluate", text_model, "--task", file, "--quiet", "--score", "generate", "--batch-size", 4)
    assert code == 0, err
    results, log = results_of(text_model)
    task, samples = load_task(str(file)), load_samples(load_task(str(file)))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(text_model), AutoTokenizer.from_pretrained(text_model)
    for record, sample in zip(log, samples, strict=True):
        messages = [{"role": "user", "content": "".join(getattr(p, "value", p) for p in sample.turns[0].parts)}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        made = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert record["generated"] == tokenizer.decode(made, skip_special_tokens=True)
        found = task.parse(record["generated"])
        assert record["prediction"] == (None if found is None else task.choices[found])
    assert results["invalid_rate"] == sum(record["prediction"] is None for record in log) / len(log)
    assert "auroc" not in results["scores"]
    assert {"total_accuracy", "invalid_rate"} <= results["scores"].keys()


def test_the_likelihood_is_taken_behind_the_answer_prefix(esmerge, text_model, write_task, results_of):
    file = write_task(samples=5, answer_prefix="Final answer: ")
    esmerge("evaluate", text_model, "--task", file, "--quiet")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(text_model), AutoTokenizer.from_pretrained(text_model)
    for record, sample in zip(results_of(text_model)[1], load_samples(load_task(str(file))), strict=True):
        messages = [{"role": "user", "content": "".join(getattr(p, "value", p) for p in sample.turns[0].parts)}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) + "Final answer:"
        ids, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, f"{prompt} Yes"))
        logits = model(torch.tensor([whole])).logits[0].log_softmax(dim=-1)
        expected = sum(logits[place - 1, whole[place]].item() for place in range(len(ids), len(whole)))
        assert record["log_likelihoods"]["Yes"] == pytest.approx(expected, abs=1e-5)


def test_generation_stops_at_the_ends_that_the_model_names(esmerge, text_model, write_task, results_of):
    file = write_task(5, max_new_tokens=6)
    arguments = ["evaluate", text_model, "--task", file, "--quiet", "--score", "generate", "--batch-size", 1]
    esmerge(*arguments)
    tokenizer = AutoTokenizer.from_pretrained(text_model)
    before = [tokenizer(record["generated"])["input_ids"] for record in results_of(text_model)[1]]
    end = before[0][2]
    (text_model / "generation_config.json").write_text(json.dumps({"eos_token_id": [end]}))
    code, _, err = esmerge(*arguments)
    assert code == 0, err
    for ids, record in zip(before, results_of(text_model)[1], strict=True):
        cut = ids[: ids.index(end) + 1] if end in ids else ids
        assert record["generated"] == tokenizer.decode(cut, skip_special_tokens=True)
    assert len(results_of(text_model)[1][0]["generated"]) < len(tokenizer.decode(before[0]))


def test_generation_is_greedy_whatever_the_model_prefers(esmerge, text_model, write_task, results_of, tmp_path):
    file = write_task(5, max_new_tokens=6)
    arguments = ["evaluate", text_model, "--task", file, "--quiet", "--score", "generate", "--batch-size", 5]
    esmerge(*arguments, "-o", tmp_path / "plain")
    settings = json.loads((text_model / "generation_config.json").read_text())
    prefers = {"repetition_penalty": 5.0, "num_beams": 4, "no_repeat_ngram_size": 1}
    (text_model / "generation_config.json").write_text(json.dumps({**settings, **prefers}))
    code, _, err = esmerge(*arguments, "-o", tmp_path / "prefers")
    assert code == 0, err
    assert results_of(tmp_path / "plain")[1] == results_of(tmp_path / "prefers")[1]


def test_an_end_that_the_tokenizer_adds_is_no_part_of_the_prompt(esmerge, text_model, write_task, results_of, tmp_path):
    arguments = ["evaluate", text_model, "--task", write_task(5), "--chat-template", "none", "--quiet"]
    esmerge(*arguments, "-o", tmp_path / "plain")
    content = json.loads((text_model / "tokenizer.json").read_text())
    end = {"SpecialToken": {"id": "<|end|>", "type_id": 0}}
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [sequence, end],
        "pair": [sequence, end],
        "special_tokens": {"<|end|>": {"id": "<|end|>", "ids": [4], "tokens": ["<|end|>"]}},
    }
    (text_model / "tokenizer.json").write_text(json.dumps(content))
    assert AutoTokenizer.from_pretrained(text_model)("C")["input_ids"][-1] == 4
    code, _, err = esmerge(*arguments, "-o", tmp_path / "ends")
    assert code == 0, err
    assert results_of(tmp_path / "plain")[1] == results_of(tmp_path / "ends")[1]


def test_relatives_are_known_to_the_log(esmerge, text_model, write_task, results_of):
    # All samples have the same answer, so resampling whole groups of them never changes anything.
    file = write_task(12, group="soluble")
    code, _, err = esmerge("evaluate", text_model, "--task", file, "--quiet")
    assert code == 0, err
    results, log = results_of(text_model)
    samples = load_samples(load_task(str(file)))
    assert [record["group"] for record in log] == [sample.group for sample in samples]
    assert results["settings"]["resampled"] == "soluble"


def test_the_recipe_of_a_merge_has_no_paths_of_this_machine(esmerge, text_model, write_task, results_of):
    commit = "0123456789" * 4
    specialists = {
        "molecule": {"model": "specialists/molecule", "encoder": f"lab/encoder@{commit}", "features": "data/items.st"},
        "protein": {"model": f"lab/protein@{commit}"},
        "model": {"model": "/home/me/model"},
    }
    data = {"molecule": "items/molecule.txt", "protein": f"hf://datasets/lab/items@{commit}/protein.txt"}
    probe = {"samples": 4, "template": "./{molecule} or/and {protein}", "data": data, "chat_template": "chat/a.jinja"}
    recipe = {"base": "models/base/", "specialists": specialists, "probe": probe, "method": {"name": "ties"}}
    (text_model / "esmerge.yaml").write_text(yaml.safe_dump({"recipe": recipe}))
    esmerge("evaluate", text_model, "--task", write_task(3), "--quiet")
    assert results_of(text_model)[0]["esmerge"] == {
        "base": "base",
        "specialists": {
            "molecule": {"model": "molecule", "encoder": f"lab/encoder@{commit}", "features": "items.st"},
            "protein": {"model": f"lab/protein@{commit}"},
            "model": {"model": "model"},
        },
        "probe": {**probe, "data": {**data, "molecule": "molecule.txt"}, "chat_template": "a.jinja"},
        "method": {"name": "ties"},
    }


def test_samples_longer_than_the_context_are_counted(esmerge, text_model, write_task, caplog):
    file = write_task(23)
    tokenizer, task = AutoTokenizer.from_pretrained(text_model), load_task(str(file))
    answer = max(len(tokenizer(choice)["input_ids"]) for choice in task.choices)
    lengths = []
    for sample in load_samples(task):
        messages = [{"role": "user", "content": "".join(getattr(p, "value", p) for p in sample.turns[0].parts)}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        lengths.append(len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) + answer - 1)
    most = sorted(lengths)[-4]
    longer = sum(length > most for length in lengths)
    config = json.loads((text_model / "config.json").read_text())
    for positions, warnings in ((max(lengths), 0), (most, 1)):
        (text_model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": positions}))
        caplog.clear()
        code, _, err = esmerge("evaluate", text_model, "--task", file, "--quiet")
        assert code == 0, err
        said = [record.getMessage() for record in caplog.records if "positions" in record.getMessage()]
        assert len(said) == warnings
    assert said[0].startswith(
        f"{longer} of the 23 samples of toy are up to {max(lengths)} tokens long with their answers, more than the "
        f"{most} positions of the model"
    )


class TestResume:
    """Finished results are kept where they are what would come out again, and nowhere else."""

    @pytest.fixture
    def evaluate(self, esmerge, text_model, results_of):
        """A function that evaluates with --resume; returns the results, and whether the model was asked again."""

        def evaluate(file, *options):
            log = text_model / "results" / "toy.jsonl"
            before = log.stat().st_ino if log.exists() else None
            code, _, err = esmerge("evaluate", text_model, "--task", file, "--quiet", "--resume", *options)
            assert code == 0, err
            return results_of(text_model)[0], log.stat().st_ino != before

        return evaluate

    def test_other_ways_to_read_answers_ask_again(self, evaluate, write_task):
        generate = ("--score", "generate")
        assert evaluate(write_task(5, max_new_tokens=2), *generate)[1]
        assert not evaluate(write_task(5, max_new_tokens=2), *generate)[1]
        for changes in ({}, {"answer_prefix": "So: "}, {"spellings": {"y": "Yes"}}):
            assert evaluate(write_task(5, max_new_tokens=3, **changes), *generate)[1]
            assert not evaluate(write_task(5, max_new_tokens=3, **changes), *generate)[1]

    def test_what_likelihoods_do_not_depend_on_does_not(self, evaluate, write_task):
        evaluate(write_task(5, max_new_tokens=2))
        assert not evaluate(write_task(5, max_new_tokens=3, spellings={"y": "Yes"}))[1]

    def test_other_metrics_and_seeds_judge_the_same_answers(self, evaluate, write_task, esmerge, text_model, tmp_path):
        first, _ = evaluate(write_task(metrics=["accuracy"]))
        second, again = evaluate(write_task(metrics=["mcc", "auroc"]), "--seed", 7)
        assert not again
        assert list(second["scores"]) == second["task"]["metrics"] == ["mcc", "auroc"]
        assert second["settings"]["seed"] == 7
        esmerge(
            "evaluate", text_model, "--task", write_task(metrics=["mcc", "auroc"]), "--seed", 7, "-o", tmp_path / "x"
        )
        assert json.loads((tmp_path / "x" / "results" / "toy.json").read_text())["scores"] == second["scores"]
        assert first["run"] == second["run"]

    def test_a_log_of_other_results_is_not_trusted(self, evaluate, write_task, text_model):
        evaluate(write_task(5))
        log = text_model / "results" / "toy.jsonl"
        good = log.read_text()
        log.write_text(good.replace("Yes", "yes"))
        evaluate(write_task(5))
        assert log.read_text() == good


def test_several_tasks_and_an_adapter(esmerge, llama, write_task, results_of, tmp_path):
    adapter = shutil.copytree(llama / "molecule", tmp_path / "adapter")
    files = [write_task(7), write_task(11, name="other", version=3)]
    arguments = [part for file in files for part in ("--task", file)]
    code, _, err = esmerge("evaluate", adapter, *arguments, "--quiet", "--base", llama / "base")
    assert code == 0, err
    first, second = results_of(adapter)[0], results_of(adapter, "other")[0]
    assert (first["samples"], second["samples"]) == (7, 11)
    assert second["task"]["version"] == 3
    assert first["model"]["base"]["name"] == "base"
    esmerge("evaluate", llama / "base", "--task", files[0], "--quiet", "-o", tmp_path / "base-results")
    base = results_of(tmp_path / "base-results")
    assert base[0]["model"]["hash"] == first["model"]["base"]["hash"]
    assert base[1] != results_of(adapter)[1]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("how", ["saved", "beside", "tokens", "one end"])
def test_an_adapter_that_trained_new_tokens(
    esmerge, text_model, make_base, write_task, results_of, tmp_path, how, tied
):
    """On a base that does not have them."""
    tokenizer = AutoTokenizer.from_pretrained(text_model)
    config = transformers.AutoConfig.from_pretrained(text_model)
    config.tie_word_embeddings = tied
    base = make_base(config, tmp_path / "base")
    tokenizer.save_pretrained(base)
    tokenizer.add_tokens(["[MOL]", "[/MOL]"])
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer))
    settings = {
        "saved": {"modules_to_save": ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]},
        "beside": {},
        "tokens": {"trainable_token_indices": [len(tokenizer) - 2, len(tokenizer) - 1]},
        "one end": {"target_modules": ["q_proj", "embed_tokens"]},
    }
    config = LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"]} | settings[how])
    adapter = tmp_path / "adapter"
    model = get_peft_model(model, config)
    model.save_pretrained(adapter, save_embedding_layers=how != "one end")
    if how == "one end":
        stored = load_file(adapter / "adapter_model.safetensors")
        stored["base_model.model.model.embed_tokens.base_layer.weight"] = model.get_input_embeddings().weight.detach()
        save_file(stored, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(adapter)
    file = write_task(3)
    code, _, err = esmerge("evaluate", adapter, "--task", file, "--quiet")
    if how == "one end" and not tied:
        # Nobody knows what the head makes of the new tokens.
        assert code == 2 and "does not fit the base" in err
        return
    assert code == 0, err
    loaded = model.eval()
    task, samples = load_task(str(file)), load_samples(load_task(str(file)))
    for record, sample in zip(results_of(adapter)[1], samples, strict=False):
        expected = plain_scores(loaded, tokenizer, task, sample)
        assert list(record["log_likelihoods"].values()) == pytest.approx(expected, abs=1e-5)


def test_a_push_while_it_runs_changes_nothing(
    esmerge, connected, on_hub, llama, write_task, results_of, tmp_path, monkeypatch
):
    """All is read from the commit that the results name."""
    commit = on_hub(llama / "base", "lab/base")
    other = shutil.copytree(llama / "base", tmp_path / "other")
    weights = {name: 1.5 * tensor for name, tensor in load_file(other / "model.safetensors").items()}
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    prepare = evaluate._prepare

    def push(*arguments):
        on_hub(other, "lab/base")
        return prepare(*arguments)

    found = []
    for place in ("before", "pushed"):
        code, _, err = esmerge("evaluate", "lab/base", "--task", write_task(5), "--quiet", "-o", tmp_path / place)
        assert code == 0, err
        found.append(results_of(tmp_path / place))
        monkeypatch.setattr(evaluate, "_prepare", push)
    assert found[0][1] == found[1][1]
    assert [results["model"]["commit"] for results, _ in found] == [commit, commit]


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_of_a_base_on_the_hub_is_no_reason_to_begin_anew(
    esmerge, connected, on_hub, llama, write_task, results_of, tmp_path
):
    base = shutil.copytree(llama / "base", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (base / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": classes}))
    (base / "own.py").write_text(OWN_CODE)
    on_hub(base, "lab/base")
    adapter = shutil.copytree(llama / "molecule", tmp_path / "adapter")
    arguments = ("evaluate", adapter, "--base", "lab/base", "--task", write_task(5), "--quiet", "--trust-remote-code")
    files = []
    for more in ((), ("--resume",)):
        code, _, err = esmerge(*arguments, *more)
        assert code == 0, err
        files.append((adapter / "results" / "toy.jsonl").stat().st_ino)
    assert results_of(adapter)[0]["run"]["code"][1] is not None
    assert files[0] == files[1]
