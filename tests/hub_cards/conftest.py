"""Parents on a Hub, with cards, and merges of them."""

import json
import shutil

import pytest
import yaml


def card(**metadata):
    return f"---\n{yaml.safe_dump(metadata)}---\n\n# A parent\n".encode()


CITATION = "@article{mol,\n  title={Molecules}\n}"
CARDS = {
    "base": card(license="apache-2.0", language=["en"], datasets=["lab/pretraining"]),
    "molecule": card(license="apache-2.0", language=["en", "de"], datasets=["lab/molecules"])
    + f"```bibtex\n{CITATION}\n```\n".encode(),
    "protein": card(license="apache-2.0", datasets=["lab/proteins"]),
    "cell": card(tags=["cells"]),
}


@pytest.fixture
def put_parents(on_hub, tmp_path):
    """A function that uploads base and specialists of a folder as `lab/<name>`, with cards, and returns the commits."""

    def put(folder, **changed_cards):
        commits = {}
        for name, text in {**CARDS, **changed_cards}.items():
            copy = tmp_path / "parents" / name
            shutil.copytree(folder / name, copy)
            if (config := copy / "adapter_config.json").exists():
                content = json.loads(config.read_text())
                config.write_text(json.dumps({**content, "base_model_name_or_path": "lab/base"}))
            (copy / "README.md").unlink(missing_ok=True)
            if text is not None:
                (copy / "README.md").write_bytes(text)
            commits[name] = on_hub(copy, f"lab/{name}")
        return commits

    return put


@pytest.fixture
def from_hub(connected, put_parents, llama, recipe, tmp_path):
    """A function that merges `llama`'s specialists as repositories of the Hub, and returns the folder of the result.

    Args of the function: `folder` of the parents, fields of the recipe, cards that differ by parent.
    """
    from esmerge.pipeline import merge
    from esmerge.recipe import parse_recipe

    def run(folder=llama, name="merged", cards=None, **fields):
        commits = put_parents(folder, **(cards or {}))
        hub_ids = {
            "base": f"lab/base@{commits['base']}",
            "specialists": {name: f"lab/{name}@{commits[name]}" for name in recipe["specialists"]},
        }
        merge(parse_recipe({**recipe, **hub_ids, "coefficients": "uniform", **fields}, folder), tmp_path / name, False)
        return tmp_path / name

    return run


@pytest.fixture
def results():
    """A function that writes results/<task>.json as `esmerge evaluate` does, with some fields changed."""

    from esmerge.records import model_hashes

    def write(folder, name="b3db", **changes):
        content = {
            "task": {
                "name": name,
                "version": 1,
                "title": "Blood-brain barrier",
                "dataset": None,
                "benchmark": None,
                "licence": "cc0-1.0",
                "citation": "Meng et al. (2021)",
                "metrics": ["auroc", "accuracy"],
                "choices": ["Yes", "No"],
                "baselines": [{"model": "ES-Merging", "metric": "accuracy", "value": 0.66, "source": "arXiv 1"}],
            },
            "model": {"name": "merged", "hash": model_hashes(folder)[0], "weights": model_hashes(folder)[1]},
            "samples": 748,
            "scores": {
                "auroc": {"value": 0.8761, "low": 0.8512, "high": 0.9},
                "accuracy": {"value": 0.81, "low": 0.78, "high": 0.84},
            },
            "invalid_rate": 0.0,
            "run": {},
            "settings": {"score": "likelihood", "normalise": "none", "limit": None},
            "esmerge": None,
        }
        for key, value in changes.items():
            content[key] = {**content[key], **value} if isinstance(content.get(key), dict) else value
        (folder / "results").mkdir(exist_ok=True)
        (folder / "results" / f"{name}.json").write_text(json.dumps(content))

    return write
