"""One recipe merged in several ways: each result is that of a plain merge, and the table says what they differ in."""

import math
import re
import shutil
import threading
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from esmerge.checkpoint import Checkpoint
from esmerge.pipeline import compare
from esmerge.plan import make_plan
from esmerge.rawio import read_into
from esmerge.recipe import load_recipe, parse_recipe, read_variants

NAMES = ["molecule", "protein", "cell"]


@pytest.fixture
def recipe_file(llama, recipe, tmp_path):
    """A recipe file beside the models' folder, with absolute paths in it."""

    def save(**changes):
        content = recipe | {"base": str(llama / "base")} | changes
        content["specialists"] = {name: str(llama / name) for name in content["specialists"]}
        content["probe"]["data"] = {name: str(llama / f"{name}.txt") for name in content["probe"]["data"]}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return tmp_path / "recipe.yaml"

    return save


@pytest.fixture
def wide(monkeypatch):
    """A terminal that does not wrap the table."""
    monkeypatch.setenv("COLUMNS", "200")


METHODS = ["linear", "{name: ties, density: 0.5}", "{name: dare_linear, density: 0.5}", "tsv"]
SOURCES = ["uniform", "{from: embedding_signals, projections: 32}"]
FOLDERS = [
    f"{method}-{source}"
    for method in ("linear", "ties_density_0.5", "dare_linear_density_0.5", "tsv")
    for source in ("uniform", "embedding_signals_projections_32")
]


@pytest.mark.parametrize(
    "changes",
    [
        {"output": {"format": "full"}},
        {"output": {"rank": 6}},
        {"space": "factors", "output": {"format": "full"}},
        {"space": "factors"},
    ],
    ids=["full", "adapter", "full from factors", "factors"],
)
def test_each_folder_is_a_plain_merge(esmerge, recipe_file, tmp_path, wide, changes):
    file = recipe_file(**changes)
    chosen = [f"--method={method}" for method in METHODS] + [f"--coefficients={source}" for source in SOURCES]
    code, out, err = esmerge("compare", file, "-o", tmp_path / "compared", "--quiet", *chosen)
    assert (code, err) == (0, "")
    assert sorted(path.name for path in (tmp_path / "compared").iterdir()) == sorted(FOLDERS)
    pairs = [(method, source) for method in METHODS for source in SOURCES]
    for folder, (method, source) in zip(FOLDERS, pairs, strict=True):
        assert re.search(rf"│ {re.escape(folder)} ", out), out
        options = ["--set", f"method={method}", "--set", f"coefficients={source}"]
        code, _, err = esmerge("merge", file, "-o", tmp_path / folder, "--quiet", *options)
        assert code == 0, err
        alone, compared = tmp_path / folder, tmp_path / "compared" / folder
        names = sorted(path.name for path in alone.iterdir())
        assert sorted(path.name for path in compared.iterdir()) == names
        for name in names:
            if name != "esmerge.yaml":
                assert (compared / name).read_bytes() == (alone / name).read_bytes(), (folder, name)
        records = [yaml.safe_load((f / "esmerge.yaml").read_text()) for f in (compared, alone)]
        assert records[0]["inputs"] == records[1]["inputs"]
        assert records[0]["recipe"]["method"] == records[1]["recipe"]["method"]


def test_methods_that_match_are_plain_merges_too(recipe, merge, llama, tmp_path):
    """However far the probe runs for the others."""
    methods = ["linear", "embedding_matching", {"name": "embedding_matching", "activations": "merged"}, "regmean"]
    methods += [{"name": "embedding_matching", "tokens": "own_and_after"}, {"name": "regmean", "activations": "merged"}]
    signals = {"from": "embedding_signals", "projections": 32}
    pairs = [(method, "uniform") for method in methods]
    pairs += [("linear", signals), ("embedding_matching", signals | {"granularity": "layer"})]
    variants = {f"v{n}": {"method": method, "coefficients": source} for n, (method, source) in enumerate(pairs)}
    compare(parse_recipe(recipe, llama), variants, tmp_path / "compared", progress=False)
    for name, variant in variants.items():
        alone = merge(recipe | variant, name)
        for file in ("adapter_model.safetensors", "coefficients.safetensors"):
            assert (tmp_path / "compared" / name / file).read_bytes() == (alone / file).read_bytes(), (variant, file)


def dense_deltas(adapter):
    """The adapter's deltas by module, from its factors alone; all of them have scaling 2."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    names = sorted(name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight"))
    return {n: 2 * tensors[f"{n}.lora_B.weight"].double() @ tensors[f"{n}.lora_A.weight"].double() for n in names}


def flat(deltas):
    return torch.cat([delta.flatten() for delta in deltas.values()])


def expected_rows(specialists, merged):
    """Norm, cosines and shares of opposed signs, computed on everything at once."""
    total = flat(merged)
    cosines, conflicts = [], []
    for deltas in specialists:
        own = flat(deltas)
        cosines.append(float(total @ own / (total.norm() * own.norm())))
        conflicts.append(float(((total * own) < 0).sum() / (own != 0).sum()))
    return float(total.norm()), cosines, conflicts


@pytest.fixture
def deltas(llama):
    return [dense_deltas(llama / name) for name in NAMES]


def magnitude_pruned(deltas, density):
    pruned = {}
    for name, delta in deltas.items():
        threshold = delta.abs().flatten().sort(descending=True).values[int(density * delta.numel()) - 1]
        pruned[name] = torch.where(delta.abs() >= threshold, delta, 0)
    return pruned


def weighted(deltas, weights):
    return {n: sum(w * d[n] for w, d in zip(weights, deltas, strict=True)) for n in deltas[0]}


@pytest.fixture
def variants(deltas):
    """Variants of full weights, with the merged deltas worked out from the factors."""
    pruned = [magnitude_pruned(delta, 0.4) for delta in deltas]
    return {
        "linear": ({"method": "linear", "coefficients": "uniform"}, weighted(deltas, [1 / 3] * 3)),
        "lopsided": (
            {"method": "task_arithmetic", "coefficients": {"molecule": 1, "protein": 0.2, "cell": 0}},
            weighted(deltas, [1, 0.2, 0]),
        ),
        "sparse": (
            {"method": {"name": "magnitude_prune", "density": 0.4}, "coefficients": "uniform"},
            weighted(pruned, [1 / 3] * 3),
        ),
    }


def test_statistics_are_those_of_the_whole_deltas(llama, recipe, tmp_path, deltas, variants):
    content = parse_recipe(recipe | {"output": {"format": "full"}}, llama)
    chosen = {name: fields for name, (fields, _) in variants.items()}
    found = compare(content, chosen, tmp_path / "compared", progress=False)
    assert list(found) == list(variants)
    for name, (_, merged) in variants.items():
        norm, cosines, conflicts = expected_rows(deltas, merged)
        assert found[name].deltas.norm == pytest.approx(norm, rel=1e-5)
        assert found[name].deltas.cosines == pytest.approx(cosines, abs=1e-5)
        assert found[name].deltas.sign_conflicts == pytest.approx(conflicts, abs=1e-3)
        assert found[name].kept_energy is None


def test_statistics_of_adapters_are_those_of_what_was_written(llama, recipe, tmp_path, deltas):
    rank, content = 5, parse_recipe(recipe | {"output": {"rank": 5}}, llama)
    chosen = {name: {"method": name, "coefficients": "uniform"} for name in ("linear", "ties")}
    found = compare(content, chosen, tmp_path / "compared", progress=False)
    exact = weighted(deltas, [1 / 3] * 3)
    values = {name: torch.linalg.svdvals(delta).square() for name, delta in exact.items()}
    energies = [float(squares[:rank].sum() / squares.sum()) for squares in values.values()]
    assert found["linear"].kept_energy == pytest.approx(sum(energies) / len(energies), rel=1e-5)
    assert math.sqrt(sum(float(squares[:rank].sum()) for squares in values.values())) == pytest.approx(
        found["linear"].deltas.norm, rel=1e-5
    )
    written = {name: delta / 2 for name, delta in dense_deltas(tmp_path / "compared" / "linear").items()}
    norm, cosines, conflicts = expected_rows(deltas, written)
    assert found["linear"].deltas.norm == pytest.approx(norm, rel=1e-5)
    assert found["linear"].deltas.cosines == pytest.approx(cosines, abs=1e-5)
    assert found["linear"].deltas.sign_conflicts == pytest.approx(conflicts, abs=1e-3)
    assert found["ties"].kept_energy < 1


def test_statistics_of_matched_weights_are_those_of_all_their_rows(llama, recipe, tmp_path, monkeypatch):
    """Matched in taller blocks than statistics are taken in, of a height that these need not divide."""
    monkeypatch.setattr("esmerge.scores.BLOCK_ELEMENTS", 3 * 32)
    monkeypatch.setattr("esmerge.merging._MATCHED_TOGETHER", 2)
    for name in recipe["specialists"]:
        base = AutoModelForCausalLM.from_pretrained(llama / "base", dtype=torch.float32)
        PeftModel.from_pretrained(base, llama / name).merge_and_unload().save_pretrained(tmp_path / name)
        recipe["specialists"][name] = {"model": str(tmp_path / name)}
    recipe |= {"coefficients": "uniform", "output": {"format": "full"}}
    variants = {"matching": {"method": "embedding_matching"}}
    found = compare(parse_recipe(recipe, llama), variants, tmp_path / "compared", progress=False)
    merged = load_file(tmp_path / "compared" / "matching" / "model.safetensors")
    base = load_file(llama / "base" / "model.safetensors")
    squares = sum(float((merged[name].double() - own.double()).square().sum()) for name, own in base.items())
    assert found["matching"].deltas.norm == pytest.approx(squares**0.5, rel=1e-4)


def test_one_variant_is_compared_in_one_process(llama, recipe, tmp_path, monkeypatch):
    """Statistics would stay in forked ones."""
    monkeypatch.setattr("esmerge.writing.FORKED_BYTES", 0)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        content = parse_recipe(recipe | {"coefficients": "uniform", "output": {"format": "full"}}, llama)
        found = compare(content, {"only": {"method": "linear"}}, tmp_path / "compared", progress=False)
    finally:
        torch.set_num_threads(threads)
    assert found["only"].deltas.norm > 0


def test_table_shows_the_statistics(esmerge, recipe_file, tmp_path, wide, deltas):
    file = recipe_file(coefficients={"molecule": 1, "protein": 0, "cell": 0}, output={"format": "full"})
    options = ["--method=task_arithmetic", "--method={name: magnitude_prune, density: 0.4}"]
    code, out, _ = esmerge("compare", file, "-o", tmp_path / "compared", "--quiet", *options)
    assert code == 0
    none = [{name: torch.zeros_like(delta) for name, delta in deltas[0].items()}] * 2
    for label, merged in {
        "task_arithmetic": weighted([deltas[0], *none], [1, 0, 0]),
        "magnitude_prune_density_0.4": magnitude_pruned(deltas[0], 0.4),
    }.items():
        norm, cosines, _ = expected_rows(deltas, merged)
        cells = [cell.split() for cell in next(line for line in out.splitlines() if f" {label} " in line).split("│")]
        assert float(cells[2][0]) == pytest.approx(norm, rel=1e-3)
        assert [float(cell[0]) for cell in cells[3:6]] == pytest.approx(cosines, abs=1e-3)
        assert cells[3][1] == "0.0%", "its own signs are not opposed"
        shares = [float(cell[1].removesuffix("%")) for cell in cells[4:6]]
        assert shares == pytest.approx([100 * share for share in expected_rows(deltas, merged)[2][1:]], abs=0.1)


def test_reads_back_what_a_variant_was(esmerge, recipe_file, tmp_path):
    """The record of a variant is a recipe of its own."""
    options = ["--method=linear", "--method={name: ties, density: 0.5}", "--coefficients=uniform"]
    code, _, err = esmerge("compare", recipe_file(), "-o", tmp_path / "compared", "--quiet", *options)
    assert code == 0, err
    folder = tmp_path / "compared" / "ties_density_0.5-uniform"
    record = yaml.safe_load((folder / "esmerge.yaml").read_text())["recipe"]
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(record, sort_keys=False))
    code, _, err = esmerge("merge", tmp_path / "again.yaml", "-o", tmp_path / "again", "--quiet")
    assert code == 0, err
    for file in folder.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        (["--method=linear"], "nothing to compare"),
        ([], "nothing to compare"),
        (["--method=linear", "--method=tise"], "did you mean ties?"),
        (["--method=linear", "--method={name: ties, densty: 1}"], "did you mean density?"),
        (["--coefficients=uniform", "--coefficients={molecule: 1}"], "coefficients.protein is missing"),
        (["--method=linear", "--method={"], "no valid YAML"),
        (["--method=linear", "--method=slerp"], "slerp merges 2 specialists"),
        (
            [f"--coefficients={{from: embedding_signals, projections: {n}}}" for n in (8, 16)],
            "coefficients.projections need a probe each",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_variants_leave_nothing(esmerge, recipe_file, tmp_path, options, culprit):
    file = recipe_file()
    code, out, err = esmerge("compare", file, "-o", tmp_path / "compared", "--quiet", *options)
    assert (code, out) == (2, "")
    assert culprit in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.fixture
def reads(monkeypatch):
    """How often each byte of each file was read through the reader of tensors."""
    counts = defaultdict(dict)
    lock = threading.Lock()

    def counting(descriptor, tensor, offset):
        file = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        with lock:
            for byte in range(offset, offset + tensor.nbytes):
                counts[file][byte] = counts[file].get(byte, 0) + 1
        read_into(descriptor, tensor, offset)

    monkeypatch.setattr("esmerge.checkpoint.read_into", counting)
    return counts


VARIANTS = {
    "methods": (
        [
            "linear",
            "task_arithmetic",
            "{name: ties, density: 0.5}",
            "{name: dare_ties, density: 0.5}",
            "tsv",
            "karcher",
        ],
        ["uniform", "{molecule: 1, protein: 0.5, cell: 0.2}"],
    ),
    "weighted sums": (["linear", "task_arithmetic"], ["uniform", "{molecule: 1, protein: 0.5, cell: 0.2}"]),
}


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs to know the files behind descriptors")
@pytest.mark.parametrize("output", [{"format": "full"}, {"rank": 4}], ids=["full", "adapter"])
@pytest.mark.parametrize("variants", VARIANTS)
def test_every_byte_of_the_inputs_is_read_once(llama, recipe, tmp_path, monkeypatch, reads, variants, output):
    """Whatever the number of variants; beside what the checks before the merge look at."""
    monkeypatch.setattr("esmerge.scores.BLOCK_ELEMENTS", 400)
    base = load_file(llama / "base" / "model.safetensors")
    for number, name in enumerate(NAMES):
        torch.manual_seed(number)
        shutil.copytree(llama / "base", tmp_path / name)
        own = {n: t + torch.randn(t.shape) * 0.1 if "_proj" in n else t for n, t in base.items()}
        save_file(own, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    recipe |= {"specialists": {name: str(tmp_path / name) for name in NAMES}, "output": output}
    recipe |= {"coefficients": "uniform"}
    content = parse_recipe(recipe, llama)
    make_plan(content)
    checks = {file: dict(counts) for file, counts in reads.items()}
    reads.clear()
    compare(content, read_variants(*VARIANTS[variants]), tmp_path / "compared", progress=False)
    files = [llama / "base" / "model.safetensors", *(tmp_path / name / "model.safetensors" for name in NAMES)]
    assert {str(file) for file in files} == reads.keys()
    for file in files:
        with Checkpoint.open_file(file) as checkpoint:
            places = {name: checkpoint.info(name) for name in checkpoint}
        for name, place in places.items():
            counts = reads[str(file)]
            extra = {
                counts.get(byte, 0) - checks[str(file)].get(byte, 0)
                for byte in range(place.offset, place.offset + place.nbytes)
            }
            # What the checks read from first to last need not be read again for the hash of an input.
            checked = place.offset + place.nbytes - 1 in checks[str(file)]
            assert extra <= ({0, 1} if checked else {1}), (file, name, extra)


def test_warnings_come_once(llama, recipe, tmp_path, caplog):
    """The inputs are opened and checked once, not for each variant."""
    config = AutoConfig.from_pretrained(llama / "base")
    torch.manual_seed(99)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "cell")
    recipe["specialists"] |= {"cell": str(tmp_path / "cell")}
    recipe |= {"coefficients": "uniform", "output": {"format": "full"}}
    variants = read_variants(["linear", "ties", "tsv"], [])
    compare(parse_recipe(recipe, llama), variants, tmp_path / "compared", progress=False)
    [sentence] = [record.getMessage() for record in caplog.records]
    assert sentence.startswith("cell is as far from the base as an unrelated model is")


def test_variants_of_granularity_share_a_probe(recipe_file, tmp_path):
    """The scores that one variant needs and the other does not are measured once."""
    sources = [
        "{from: embedding_signals, projections: 32, granularity: layer}",
        "{from: embedding_signals, projections: 32, granularity: both}",
    ]
    recipe = load_recipe(recipe_file(output={"format": "full"}))
    found = compare(recipe, read_variants([], sources), tmp_path / "compared", progress=False)
    tensors = [load_file(tmp_path / "compared" / name / "coefficients.safetensors") for name in found]
    assert torch.equal(tensors[0]["alpha"], tensors[1]["alpha"])
    spread = [max(float(t.max()) for n, t in stored.items() if n.startswith("lambda.std")) for stored in tensors]
    assert spread[0] == 0 < spread[1]
