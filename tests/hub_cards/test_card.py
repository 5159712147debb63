"""Model cards: what they say, what the Hub makes of them, and what a person's edits survive."""

import getpass
import re
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard, metadata_load, parse_eval_result_entries
from huggingface_hub.repocard_data import model_index_to_eval_results
from safetensors.torch import load_file, save_file

from hub_cards.licences import LICENCES

LLAMA3 = b"---\nlicense: llama3.1\n---\n"


def metadata(folder):
    return metadata_load(folder / "README.md")


def text(folder):
    return (folder / "README.md").read_text()


def replace_in_card(folder, old, new):
    assert old in text(folder)
    (folder / "README.md").write_text(text(folder).replace(old, new))


def test_adapter_from_the_hub(from_hub, esmerge):
    folder = from_hub()
    code, output, error = esmerge("card", folder)
    assert code == 0, error
    assert "README.md" in output and "licence of lab/cell is not known" in output and "not evaluated" in output
    found = metadata(folder)
    assert found["base_model"] == "lab/base"
    assert found["base_model_relation"] == "adapter"
    assert found["library_name"] == "peft"
    assert found["tags"] == ["lora", "merge", "esmerge"]
    assert found["pipeline_tag"] == "text-generation"
    assert found["license"] == "apache-2.0"
    assert found["language"] == ["en", "de"]
    assert found["datasets"] == ["lab/molecules", "lab/proteins"]
    assert "model-index" not in found
    ModelCard.load(folder / "README.md").validate()
    record = yaml.safe_load((folder / "esmerge.yaml").read_text())["inputs"]
    for name, pin in {"base": record["base"], **record["specialists"]}.items():
        assert f"[lab/{name}](https://huggingface.co/lab/{name}/tree/{pin['commit']})" in text(folder)
    assert "@article{mol,\n  title={Molecules}\n}" in text(folder)
    assert "**This model has not been evaluated.**" in text(folder)


def test_full_checkpoint_names_all_parents(from_hub, esmerge):
    folder = from_hub(output={"format": "full"})
    assert esmerge("card", folder)[0] == 0
    found = metadata(folder)
    assert found["base_model"] == ["lab/base", "lab/molecule", "lab/protein", "lab/cell"]
    assert (found["base_model_relation"], found["library_name"]) == ("merge", "transformers")
    assert found["tags"] == ["merge", "esmerge"]
    ModelCard.load(folder / "README.md").validate()


def test_licences_that_differ_need_a_choice(from_hub, esmerge):
    folder = from_hub(cards={"protein": LLAMA3})
    code, _, error = esmerge("card", folder)
    assert code == 2
    for part in ("apache-2.0 (lab/base)", "llama3.1 (lab/protein)", "--license"):
        assert part in error
    assert not (folder / "README.md").exists()
    code, _, error = esmerge("card", folder, "--license", "lama3.1")
    assert code == 2
    assert "did you mean llama3.1?" in error
    for _ in range(2):  # saying it again takes nothing back
        assert esmerge("card", folder, "--license", "llama3.1")[0] == 0
        assert metadata(folder)["license"] == "llama3.1"
    # Given once, it is remembered; written into the card by hand, it counts too.
    assert esmerge("card", folder)[0] == 0
    assert metadata(folder)["license"] == "llama3.1"
    replace_in_card(folder, "license: llama3.1", "license: cc-by-nc-4.0")
    for _ in range(2):
        assert esmerge("card", folder)[0] == 0
        assert metadata(folder)["license"] == "cc-by-nc-4.0"
    assert esmerge("card", folder, "--license", "mit")[0] == 0
    assert metadata(folder)["license"] == "mit"


def test_licence_with_name_and_link_is_inherited(from_hub, esmerge):
    own = b"---\nlicense: other\nlicense_name: lab-licence\nlicense_link: https://lab.org/licence\n---\n"
    folder = from_hub(cards=dict.fromkeys(("base", "molecule", "protein", "cell"), own))
    assert esmerge("card", folder)[0] == 0
    found = metadata(folder)
    assert [found[key] for key in ("license", "license_name", "license_link")] == [
        "other",
        "lab-licence",
        "https://lab.org/licence",
    ]
    assert "[lab-licence](https://lab.org/licence)" in text(folder)


def test_a_licence_beside_the_parents_card_is_linked_from_elsewhere(from_hub, esmerge):
    own = b"---\nlicense: other\nlicense_name: lab-licence\nlicense_link: LICENSE\n---\n"
    folder = from_hub(cards=dict.fromkeys(("base", "molecule", "protein", "cell"), own))
    assert esmerge("card", folder)[0] == 0
    commit = yaml.safe_load((folder / "esmerge.yaml").read_text())["inputs"]["base"]["commit"]
    link = f"https://huggingface.co/lab/base/blob/{commit}/LICENSE"
    assert metadata(folder)["license_link"] == link and f"[lab-licence]({link})" in text(folder)


def test_an_encoder_from_elsewhere_is_a_parent(from_hub, esmerge, on_hub):
    folder = from_hub()
    card = b"---\nlicense: cc-by-nc-4.0\n---\n"
    commit = on_hub({"README.md": card, "config.json": b"{}"}, "lab/esm")
    record = yaml.safe_load((folder / "esmerge.yaml").read_text())
    record["recipe"]["specialists"]["protein"]["encoder"] = f"lab/esm@{commit}"
    (folder / "esmerge.yaml").write_text(yaml.safe_dump(record))
    code, _, error = esmerge("card", folder)
    assert code == 2 and "cc-by-nc-4.0 (lab/esm)" in error and "--license" in error
    assert esmerge("card", folder, "--license", "cc-by-nc-4.0")[0] == 0
    link = f"[lab/esm](https://huggingface.co/lab/esm/tree/{commit})"
    assert f"| encoder of protein | {link} | `{commit}` | cc-by-nc-4.0 |" in text(folder)


def test_licences_are_those_of_the_hub(connected):
    for licence in LICENCES:
        ModelCard(f"---\nlicense: {licence}\n---\n").validate()
    with pytest.raises(ValueError, match="license"):
        ModelCard("---\nlicense: my-own\n---\n").validate()


def test_local_parents_leave_no_trace_of_the_machine(llama, recipe, esmerge, tmp_path):
    from esmerge.pipeline import merge
    from esmerge.recipe import parse_recipe

    home = tmp_path / "home" / "jane_doe"
    home.mkdir(parents=True)
    shutil.copytree(llama, home / "models")
    recipe |= {"base": str(home / "models" / "base"), "coefficients": {"from": "embedding_signals", "projections": 8}}
    recipe["specialists"] = {name: str(home / "models" / name) for name in recipe["specialists"]}
    recipe["probe"]["data"] = {name: str(home / "models" / file) for name, file in recipe["probe"]["data"].items()}
    licence = "---\nlicense: mit\nlanguage: fr\ndatasets: [lab/molecules, /home/jane_doe/data]\n---\n"
    for name in ("base", "molecule"):
        (home / "models" / name / "README.md").write_text(licence)
    merge(parse_recipe(recipe, llama), home / "merged", progress=False)
    assert esmerge("card", home / "merged")[0] == 0
    for secret in (str(tmp_path), "jane_doe", "/home", f"/{getpass.getuser()}"):
        assert secret not in text(home / "merged")
    assert "| molecule | molecule (a local folder) |" in text(home / "merged")
    found = metadata(home / "merged")
    assert "base_model" not in found
    # Cards of local parents are read too, but not of folders that have changed since.
    assert (found["license"], found["language"], found["datasets"]) == ("mit", ["fr"], ["lab/molecules"])
    (home / "models" / "molecule" / "adapter_config.json").write_text("{}")
    assert esmerge("card", home / "merged")[0] == 0
    assert metadata(home / "merged")["license"] == "mit" and "datasets" not in metadata(home / "merged")
    (home / "models" / "base" / "config.json").write_text("{}")
    assert esmerge("card", home / "merged")[0] == 0
    assert "license" not in metadata(home / "merged")
    assert esmerge("card", home / "merged", "--base-model", "lab/base@abc1234")[0] == 0
    assert metadata(home / "merged")["base_model"] == "lab/base"
    assert "https://huggingface.co/lab/base/tree/abc1234" in text(home / "merged")


def test_coefficients_as_table_and_figures(merge, recipe, esmerge):
    folder = merge(recipe)
    assert esmerge("card", folder)[0] == 0
    from esmerge.results import read_coefficients

    alpha = read_coefficients(folder).tensors["alpha"]
    for layer, row in enumerate(alpha.T.tolist()):
        assert f"| {layer} | {' | '.join(f'{value:.3f}' for value in row)} |\n" in text(folder)
    shown = re.findall(r"!\[[^]]+\]\((.+?)\)", text(folder))
    assert shown[0] == "figures/coefficients.png" and len(shown) == 5
    for path in shown:
        assert (folder / path).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("method", "coefficients", "parts"),
    [
        (
            {"name": "embedding_matching", "terms": "equal"},
            "uniform",
            ["own do to its own modality.\n", "safetensors`):\n"],
        ),
        (
            "regmean",
            "uniform",
            ["to the probe up to its last item.\n", "safetensors`), beside the size of what its layers"],
        ),
        (
            {"name": "embedding_matching", "tokens": "own_and_after", "lambda": 1.25},
            {"from": "embedding_signals", "granularity": "layer", "projections": 32},
            [
                "to its own modality and what follows the last item; the change was then multiplied by 1.25.\n",
                "from how far it moves the embeddings), beside the size of what its layers read:\n",
            ],
        ),
    ],
)
def test_methods_that_match_say_what_their_coefficients_are(merge, recipe, esmerge, method, coefficients, parts):
    folder = merge(recipe | {"coefficients": coefficients, "method": method})
    assert esmerge("card", folder)[0] == 0
    shown = text(folder)
    for part in parts:
        assert part in shown
    assert "How much of each specialist goes" not in shown
    assert "@inproceedings{jin2023dataless," in shown and "names its paper" not in shown


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("embedding_matching", "do to its own modality and what follows it in prompts of its own.\n"),
        ("regmean", "do to prompts of its own.\n"),
    ],
)
def test_prompts_of_each_specialist_are_told(merge, recipe, esmerge, method, said):
    recipe["probe"]["template"] = {name: f"What of {{{name}}}?" for name in recipe["specialists"]}
    folder = merge(recipe | {"coefficients": "uniform", "method": method})
    assert esmerge("card", folder)[0] == 0
    assert said in text(folder)


def test_a_merge_without_a_probe_has_a_card(merge, recipe, esmerge):
    del recipe["probe"]
    folder = merge(recipe | {"coefficients": "uniform", "method": "ties"})
    assert esmerge("card", folder)[0] == 0
    assert "How much of each specialist goes into each decoder layer" in text(folder)


def test_scores_come_back_from_the_card(merge, recipe, esmerge, results, connected):
    recipe["coefficients"] = "uniform"
    folder = merge(recipe)
    results(folder)
    task = {
        "title": "Tissue",
        "metrics": ["accuracy", "auroc"],
        "dataset": "lab/tissue",
        "benchmark": "lab/cells",
        "baselines": [],
    }
    undefined = {"value": None, "low": None, "high": None}
    scores = {"accuracy": {"value": 0.5, "low": 0.4, "high": 0.6}, "auroc": undefined}
    results(folder, "tissue", task=task, scores=scores, samples=208)
    results(folder, "limited", task=task, settings={"limit": 20}, samples=20)
    assert esmerge("card", folder)[0] == 0
    ModelCard.load(folder / "README.md").validate()
    found = metadata(folder)
    assert sorted(found["metrics"]) == ["accuracy", "roc_auc"]
    name, entries = model_index_to_eval_results(found["model-index"])
    assert name == "merged"
    by_score = {(entry.dataset_config, entry.metric_type): entry for entry in entries}
    assert by_score.keys() == {
        (task, metric) for task in ("b3db", "limited", "tissue") for metric in ("accuracy", "roc_auc")
    } - {("tissue", "roc_auc")}
    entry = by_score["b3db", "roc_auc"]
    assert (entry.metric_value, entry.dataset_type, entry.dataset_name) == (0.8761, "b3db", "Blood-brain barrier")
    assert entry.metric_args == {"confidence_level": 0.95, "low": 0.8512, "high": 0.9}
    assert entry.dataset_args == {"samples": 748, "version": 1}
    assert by_score["tissue", "accuracy"].dataset_type == "lab/tissue"
    assert by_score["limited", "accuracy"].dataset_args["limit"] == 20
    row = "| Blood-brain barrier | accuracy | 0.810 | 0.780 to 0.840 | 748 | ES-Merging: 0.660 (arXiv 1) |"
    assert row in text(folder)
    assert "| Tissue | area under the ROC curve | not defined |" in text(folder)
    assert "only the first 20 samples" in text(folder)
    # A part of a benchmark's samples gives no score of the benchmark.
    assert [file.name for file in (folder / ".eval_results").iterdir()] == ["tissue.yaml"]
    (reported,) = parse_eval_result_entries(yaml.safe_load((folder / ".eval_results" / "tissue.yaml").read_text()))
    assert (reported.dataset_id, reported.task_id, reported.value) == ("lab/cells", "tissue", 0.5)
    assert "208 samples" in reported.notes and "0.400 to 0.600" in reported.notes
    (folder / "results" / "tissue.json").unlink()
    assert esmerge("card", folder)[0] == 0
    assert not list((folder / ".eval_results").iterdir())


def test_edits_survive(merge, recipe, esmerge, results):
    recipe["coefficients"] = "uniform"
    folder = merge(recipe)
    assert esmerge("card", folder)[0] == 0
    once = text(folder)
    assert esmerge("card", folder)[0] == 0
    assert text(folder) == once
    replace_in_card(folder, "## Limits and biases\n\n- It", "## Limits and biases\n\n- Mine. It")
    replace_in_card(folder, "- esmerge\n---", "- esmerge\n- chemistry\nthumbnail: https://lab.org/a.png\n---")
    replace_in_card(folder, "## Licence", "## Training data\n\n```yaml\n## not a heading\n```\n\n## Licence")
    recipe_section = re.search(r"## Recipe.*?(?=## Coeff)", text(folder), re.DOTALL)[0]
    replace_in_card(folder, recipe_section, "")
    results(folder)
    for _ in range(2):
        assert esmerge("card", folder)[0] == 0
        assert "- Mine. It" in text(folder)
        assert "```yaml\n## not a heading\n```\n\n## Licence" in text(folder)
        assert "## Recipe" not in text(folder)
        found = metadata(folder)
        assert found["tags"][-1] == "chemistry" and found["thumbnail"] == "https://lab.org/a.png"
        # What nobody edited is up to date.
        assert "| Blood-brain barrier |" in text(folder) and "not been evaluated" not in text(folder)
        assert len(found["model-index"]) == 1
    assert text(folder).count("<!-- esmerge card") == 1
    (folder / "results" / "b3db.json").unlink()
    assert esmerge("card", folder)[0] == 0
    assert "model-index" not in metadata(folder) and "not been evaluated" in text(folder)


def test_card_that_a_person_wrote_is_completed(merge, recipe, esmerge):
    recipe["coefficients"] = "uniform"
    folder = merge(recipe)
    (folder / "README.md").write_bytes(
        b"---\r\nlicense: mit\r\ntags: [mine]\r\n---\r\n# My model\r\n\r\n## Use\r\n\r\nSo.\r\n"
    )
    for _ in range(2):
        assert esmerge("card", folder)[0] == 0
        assert metadata(folder)["license"] == "mit" and metadata(folder)["tags"] == ["mine"]
        assert "# My model" in text(folder) and "## Use\n\nSo.\n" in text(folder)
        assert "## Recipe" in text(folder) and "import AutoPeftModel" not in text(folder)


def test_template_of_ones_own(merge, recipe, esmerge, tmp_path):
    recipe["coefficients"] = "uniform"
    folder = merge(recipe)
    template = tmp_path / "own.jinja"
    template.write_text(
        '{% extends "card.md.jinja" %}\n{% block limits %}\n## Limits\n\n{{ base.name }}!\n{% endblock %}'
    )
    assert esmerge("card", folder, "--template", template)[0] == 0
    assert "## Limits\n\nbase!\n" in text(folder) and "## Licence" in text(folder)
    code, _, error = esmerge("card", folder)
    assert code == 2 and "--template default" in error
    assert esmerge("card", folder, "--template", "default")[0] == 0
    assert "## Limits and biases" in text(folder) and "base!" not in text(folder)
    for content, part in {"{{ nothing }}": "'nothing' is undefined", "{% if %}": "line 1"}.items():
        template.write_text(content)
        code, _, error = esmerge("card", folder, "--template", template)
        assert code == 2 and part in error and str(template) in error
    assert "own.jinja" not in text(folder)


@pytest.mark.parametrize("kind", ["adapter", "full", "multimodal adapter", "multimodal full"])
def test_code_in_the_card_runs_as_printed(from_hub, esmerge, on_hub, multimodal, llama, kind, capsys):
    fields = {"output": {"format": kind.split()[-1], "dtype": "float32"}}
    folder = from_hub(multimodal if kind.startswith("multimodal") else llama, **fields)
    assert esmerge("card", folder)[0] == 0
    # The publisher writes the name of the repository.
    replace_in_card(folder, '"merged"', '"owner/merged"')
    on_hub(folder, "owner/merged")
    (code,) = re.findall(r"```python\n(.*?)```", text(folder), re.DOTALL)
    assert ("load_model" in code) == kind.startswith("multimodal")
    capsys.readouterr()
    names = {}
    exec(code, names)
    assert names["outputs"].shape[1] > names["inputs"]["input_ids"].shape[1]
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("break_", "part"),
    [
        (lambda folder: (folder / "esmerge.yaml").unlink(), "is no esmerge result: it has no esmerge.yaml"),
        (lambda folder: (folder / "esmerge.yaml").write_text("inputs: []"), "esmerge.yaml is no record of a merge"),
        (lambda folder: (folder / "coefficients.safetensors").unlink(), "it has no coefficients.safetensors"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "it holds no model"),
        (lambda folder: (folder / "README.md").write_text("---\nlicense: [\n---\n"), "are no YAML mapping"),
        (lambda folder: (folder / "README.md").write_bytes(b"\xff\xfe"), "no text in UTF-8"),
        (lambda folder: (folder / "README.md").write_text("---\nmodel-index: 3\n---\n"), "are not valid"),
        (shutil.rmtree, "is no folder"),
    ],
)
def test_folders_that_no_card_can_be_made_of(merge, recipe, esmerge, break_, part):
    recipe["coefficients"] = "uniform"
    folder = merge(recipe)
    break_(folder)
    code, output, error = esmerge("card", folder)
    assert code == 2 and part in error and error.count("\n") == 1 and not output


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"scores": {}, "samples": 0}, "samples is 0"),
        ({"task": {"name": None}}, "task.name is None"),
        ({"scores": {"accuracy": {"value": "high"}}}, "scores.accuracy.value is 'high'"),
        ({"scores": {"accuracy": {"value": 81.0}}}, "accuracy is 81.0, expected a number from -1 to 1"),
        ({"esmerge": {"base": "other"}}, "is of another merge"),
        ({"model": {"weights": "xxh3:2"}}, "is of other weights"),
        ({"model": {"base": {"name": "other", "hash": "xxh3:3"}}}, "on another base"),
    ],
)
def test_results_that_are_none(merge, recipe, esmerge, results, changes, part):
    recipe["coefficients"] = "uniform"
    folder = merge(recipe)
    results(folder)
    results(folder, "tissue", **changes)
    code, _, error = esmerge("card", folder)
    assert code == 2 and part in error and "tissue.json" in error
    assert not (folder / "README.md").exists()


def test_scores_are_of_the_weights_and_the_base_that_are_published(merge, recipe, esmerge, llama, tmp_path, caplog):
    recipe["coefficients"] = "uniform"
    folder = merge(recipe)
    (tmp_path / "data.csv").write_text("smiles,y\nCCO,1\nCC,0\nO,1\nCN,0\n")
    task = {"name": "toy", "source": {"path": "data.csv"}, "split": {"evaluated": "train"}, "answer": "y"}
    task |= {"columns": {"molecule": "smiles"}, "labels": {1: "Yes", 0: "No"}, "choices": ["Yes", "No"]}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(task | {"prompt": "{molecule}. Soluble?", "title": "a | b"}))
    arguments = ("evaluate", folder, "--task", tmp_path / "toy.yaml", "--quiet", "--normalise", "characters")
    code, _, error = esmerge(*arguments)
    assert code == 0, error
    (folder / "LICENSE.txt").write_text("Do what you like.")
    assert esmerge("card", folder)[0] == 0
    assert "| a \\| b | accuracy |" in text(folder)
    assert "likelihoods were divided by the answers' numbers of characters" in text(folder)
    weights = (folder / "adapter_model.safetensors").read_bytes()
    save_file(
        {name: 2 * tensor for name, tensor in load_file(folder / "adapter_model.safetensors").items()},
        folder / "adapter_model.safetensors",
    )
    code, _, error = esmerge("card", folder)
    assert code == 2 and "toy.json is of other weights" in error
    (folder / "adapter_model.safetensors").write_bytes(weights)
    other = shutil.copytree(llama / "base", tmp_path / "other")
    changed = {name: 2 * tensor for name, tensor in load_file(other / "model.safetensors").items()}
    save_file(changed, other / "model.safetensors", metadata={"format": "pt"})
    caplog.clear()
    assert esmerge(*arguments, "--base", other)[0] == 0
    assert f"{folder} was merged on another base than {other}" in caplog.text
    code, _, error = esmerge("card", folder)
    assert code == 2 and "toy.json is of this adapter on another base" in error


def test_parents_without_card_or_repository(from_hub, esmerge, connected):
    folder = from_hub(cards={"cell": None})
    del connected.repositories["models", "lab/protein"]
    shutil.rmtree(folder.parent / "hf-home")
    assert esmerge("card", folder)[0] == 0
    assert metadata(folder)["license"] == "apache-2.0"
    assert text(folder).count("| not stated |") == text(folder).count("| card not readable |") == 1


def test_a_base_whose_licence_is_not_stated(from_hub, esmerge):
    """The specialists' licence is not that of the whole."""
    folder = from_hub(cards={"base": b"---\ntags: [base]\n---\n"})
    code, output, _ = esmerge("card", folder)
    assert code == 0 and "the licence of lab/base is not known, as no card of it states one, so" in output
    assert "license" not in metadata(folder)
    assert "It cannot be told which licence this model has, as no card of the base states one" in text(folder)
    assert esmerge("card", folder, "--license", "apache-2.0")[0] == 0
    assert metadata(folder)["license"] == "apache-2.0" and "cannot be told" not in text(folder)


@pytest.mark.parametrize("hindrance", ["offline", "gated", "network"])
def test_a_base_whose_card_cannot_be_read(from_hub, esmerge, connected, monkeypatch, hindrance):
    folder = from_hub()
    if hindrance == "gated":
        connected.repositories["models", "lab/base"].gated = "manual"
        monkeypatch.setenv("HF_TOKEN", "hf_othersWriteToken")
    elif hindrance == "network":
        connected.fail(path="/lab/base/resolve/", drop=True, times=99)
        monkeypatch.setattr("time.sleep", lambda seconds: None)
    else:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, output, _ = esmerge("card", folder)
    assert code == 0 and "the licence of lab/base is not known, as its card cannot be read, so" in output
    assert "license" not in metadata(folder)
    assert metadata(folder)["base_model"] == "lab/base"
    assert "It cannot be told which licence this model has, as the base's card could not be read" in text(folder)
    assert "| card not readable |" in text(folder)
