"""Methods that match what the specialists read, against plain transformers, PEFT and the normal equations."""

import itertools
import time
import weakref
from dataclasses import replace
from functools import partial, wraps

import numpy as np
import pytest
import torch
import yaml
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from esmerge.backbone import Backbone
from esmerge.errors import InputError
from esmerge.layer_inputs import READ_POSITIONS, read_positions
from esmerge.methods import METHODS, embedding_matching, regmean
from esmerge.probe import Probe, ProbeBatch
from esmerge.scores import Scratch

NAMES = ("molecule", "protein", "cell")
LENGTH = 12


def normal_equations(deltas, weights, inputs, shrink, trace):
    """The delta that minimises the shrunk objective, in float64."""
    total = right = 0
    for delta, weight, x in zip(deltas, weights, inputs, strict=True):
        gram = x.double().numpy().T @ x.double().numpy()
        gram = shrink * gram + (1 - shrink) * np.diag(np.diag(gram))
        gram = gram * weight / (np.trace(gram) if trace else 1)
        total, right = total + gram, right + delta.double().numpy() @ gram
    return torch.from_numpy(np.linalg.solve(total, right.T).T)


@pytest.fixture
def random():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("counts", [(4, 3, 5), (40, 30, 2)])
def test_is_the_solution_of_the_normal_equations(random, counts):
    """Whether the inputs are fewer than their features or not."""
    deltas = [torch.randn(7, 24, generator=random) for _ in counts]
    scale = torch.logspace(-1, 1, 24)
    inputs = [torch.randn(count, 24, generator=random) * scale for count in counts]
    weights = torch.tensor([0.2, 0.5, 0.3])
    for shrink in (0.0, 0.5, 0.9, 0.999):
        for method, trace in (
            (partial(embedding_matching, terms="equal"), True),
            (embedding_matching, False),
            (regmean, False),
        ):
            found = method(deltas, weights, inputs=inputs, shrink=shrink, lambda_=2.0)
            expected = 2 * normal_equations(deltas, weights.tolist(), inputs, shrink, trace)
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_own_inputs_are_reproduced(random):
    """Where the specialists read unlike things, the merged delta does to each what its own would."""
    deltas = [torch.randn(6, 32, generator=random) for _ in range(2)]
    inputs = [torch.randn(5, 32, generator=random) for _ in range(2)]
    merged = embedding_matching(deltas, torch.ones(2), inputs=inputs, shrink=0.9999)
    average = embedding_matching(deltas, torch.ones(2))
    torch.testing.assert_close(average, (deltas[0] + deltas[1]) / 2)
    for delta, x in zip(deltas, inputs, strict=True):
        wanted = x @ delta.T
        assert (x @ merged.T - wanted).norm() < 0.02 * wanted.norm() < 0.1 * (x @ average.T - wanted).norm()


def test_features_that_are_always_zero_stay_out(random):
    inputs = [torch.randn(50, 8, generator=random) for _ in range(2)]
    for x in inputs:
        x[:, 3] = 0
    merged = embedding_matching([torch.ones(2, 8), torch.ones(2, 8)], torch.ones(2), inputs=inputs)
    torch.testing.assert_close(merged, torch.ones(2, 8).index_fill(1, torch.tensor([3]), 0))


@pytest.fixture
def probed(llama, recipe, random):
    """A function that writes a probe of K inputs; gives the recipe, and what each specialist's layers read."""

    def make(count, method):
        hidden, names = 32, list(NAMES)
        tensors = {
            "inputs_embeds": torch.randn(count, LENGTH, hidden, generator=random),
            "attention_mask": torch.ones(count, LENGTH, dtype=torch.int64),
        }
        tensors["attention_mask"][0, :2] = 0
        for place, name in enumerate(names):
            tensors[f"mask.{name}"] = torch.zeros(count, LENGTH, dtype=torch.bool)
            tensors[f"mask.{name}"][:, 2 + 3 * place : 4 + 3 * place] = True
        save_file(tensors, llama / f"probe-{count}.safetensors")
        content = recipe | {"probe": {"tensors": f"probe-{count}.safetensors"}, "method": method}
        content["coefficients"] = "uniform"
        tokens = "all" if method == "regmean" else "own"
        if isinstance(method, dict):
            tokens = method.get("tokens", tokens)
        read = {}
        for name in names:
            base = AutoModelForCausalLM.from_pretrained(llama / "base", dtype=torch.float32)
            model = PeftModel.from_pretrained(base, llama / name)
            own, after = tensors[f"mask.{name}"], torch.arange(LENGTH) >= 4 + 3 * names.index("cell")
            all_of_it = tensors["attention_mask"].bool() & ~after
            positions = {"own": own, "own_and_after": own | after, "all": all_of_it}[tokens]
            read[name] = {}

            def note(module, arguments, key, read=read[name], positions=positions):
                read[key] = arguments[0].detach()[positions]

            for key, module in model.base_model.model.named_modules():
                if hasattr(module, "lora_A"):
                    module.register_forward_pre_hook(lambda m, args, key=key, note=note: note(m, args, key))
            with torch.no_grad():
                model(inputs_embeds=tensors["inputs_embeds"], attention_mask=tensors["attention_mask"])
        return content, read

    return make


def expected_of(llama, read, trace, shrink=0.9):
    """Merged deltas by name of a module, from adapters and what their models read."""
    adapters = {name: load_file(llama / name / "adapter_model.safetensors") for name in NAMES}
    scaling = 8 / 4
    merged = {}
    for module in read["cell"]:
        factors = [f"base_model.model.{module}.lora_{letter}.weight" for letter in "BA"]
        deltas = [scaling * adapters[name][factors[0]] @ adapters[name][factors[1]] for name in NAMES]
        merged[module] = normal_equations(deltas, [1 / 3] * 3, [read[name][module] for name in NAMES], shrink, trace)
    return merged


@pytest.mark.parametrize(
    ("count", "method", "trace"),
    [
        (2, {"name": "embedding_matching", "terms": "equal"}, True),
        (9, {"name": "embedding_matching", "terms": "equal"}, True),
        (4, "regmean", False),
        (4, {"name": "embedding_matching", "tokens": "own_and_after"}, False),
        (4, "embedding_matching", False),
        (4, {"name": "embedding_matching", "tokens": "all", "terms": "equal"}, True),
    ],
)
def test_merged_adapter_matches_what_plain_models_read(llama, merge, probed, count, method, trace):
    content, read = probed(count, method)
    folder = merge(content)
    merged = load_file(folder / "adapter_model.safetensors")
    expected = expected_of(llama, read, trace)
    assert len(merged) == 2 * len(expected) == 2 * 3 * 7
    for module, delta in expected.items():
        factors = [merged[f"base_model.model.{module}.lora_{letter}.weight"] for letter in "BA"]
        assert factors[0].shape[1] == 12  # the specialists' ranks together, which is exact
        torch.testing.assert_close(
            (factors[0] @ factors[1]).double(),
            delta,
            rtol=1e-3,
            atol=1e-4,
            msg=lambda text, module=module: f"{module}: {text}",
        )
    record = yaml.safe_load((folder / "esmerge.yaml").read_text())
    assert record["kept_energy"]["minimum"] == pytest.approx(1)
    assert list(record["inputs"]["probe"]) == [str(llama / content["probe"]["tensors"])]


OWN_TEMPLATES = {
    "molecule": "Molecule: {molecule}\nDoes it cross the barrier?",
    "protein": "{protein}",
    "cell": ["Cell: {cell}\nWhich tissue?", "A cell. {cell}\nIs it sensitive?"],
}


def own_prompts(llama, tokenizer, count=5):
    """Of each specialist: token ids, and whether they belong to the item or stand after it."""
    prompts = {}
    for name, given in OWN_TEMPLATES.items():
        templates = itertools.cycle([given] if isinstance(given, str) else given)
        items = (llama / f"{name}.txt").read_text().splitlines()[:count]
        prompts[name] = []
        for item, template in zip(items, templates, strict=False):
            message = [{"role": "user", "content": template.format(**{name: item})}]
            text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, return_tensors="pt")
            starts, ends = encoded["offset_mapping"][0].unbind(dim=1)
            first = text.index(item)
            inside = (ends > first) & (starts < first + len(item))
            prompts[name].append((encoded["input_ids"], inside, starts >= first + len(item)))
    return prompts


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("embedding_matching", tokens) for tokens in ("own", "own_and_after", None, "all")] + [("regmean", None)],
)
@pytest.mark.parametrize("activations", ["specialist", "merged"])
def test_each_specialist_can_read_prompts_of_its_own(llama, recipe, merge, tokenizer, name, tokens, activations):
    whole, trace = name == "regmean" or tokens == "all", name == "embedding_matching"
    method = {"name": name, "activations": activations} | ({"terms": "equal"} if trace else {})
    if tokens is not None:
        method["tokens"] = tokens
    probe = recipe["probe"] | {"template": OWN_TEMPLATES}
    output = {"format": "full", "dtype": "float32"}
    folder = merge(recipe | {"probe": probe, "coefficients": "uniform", "method": method, "output": output})
    merged = load_file(folder / "model.safetensors")
    prompts = own_prompts(llama, tokenizer)
    models = {}
    for name in NAMES:
        base = AutoModelForCausalLM.from_pretrained(llama / "base", dtype=torch.float32)
        models[name] = PeftModel.from_pretrained(base, llama / name).merge_and_unload()
    for number, layer in enumerate(AutoModelForCausalLM.from_pretrained(llama / "base").model.layers):
        modules = [name for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)]
        read = {module: {name: [] for name in NAMES} for module in modules}
        for name, model in models.items():
            handles = [
                model.model.layers[number]
                .get_submodule(module)
                .register_forward_pre_hook(lambda _, args, into=read[module][name]: into.append(args[0][0]))
                for module in modules
            ]
            masks = []
            for ids, inside, after in prompts[name]:
                masks.append(inside | True if whole else inside if tokens == "own" else inside | after)
                with torch.no_grad():
                    model(input_ids=ids)
            for handle in handles:
                handle.remove()
            for module in modules:
                parts = read[module][name]
                read[module][name] = torch.cat([part[mask] for part, mask in zip(parts, masks, strict=True)])
        for module in modules:
            weight = layer.get_submodule(module).weight.detach()
            weights = [models[name].model.layers[number].get_submodule(module).weight for name in NAMES]
            deltas = [own.detach() - weight for own in weights]
            inputs = [read[module][name] for name in NAMES]
            found = merged[f"model.layers.{number}.{module}.weight"]
            expected = normal_equations(deltas, [1 / 3] * 3, inputs, 0.9, trace=trace)
            torch.testing.assert_close((found - weight).double(), expected, rtol=1e-3, atol=1e-4)
            if activations == "merged":
                for own in weights:
                    own.data.copy_(found)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", ["regmean", "embedding_matching"])
def test_layers_can_read_what_merged_layers_hand_on(llama, merge, probed, tmp_path, full, name):
    """RegMean++, against plain models whose first layers are replaced by merged ones, layer by layer."""
    method = {"name": name, "activations": "merged", "shrink": 0.8, "lambda": 1.2}
    if name == "embedding_matching":
        method["terms"] = "equal"
    content, _ = probed(5, method)
    probe = load_file(llama / content["probe"]["tensors"])
    all_of_it = probe["attention_mask"].bool() & (torch.arange(LENGTH) < 10)
    positions = {own: all_of_it if name == "regmean" else probe[f"mask.{own}"] for own in NAMES}
    models = {}
    for own in NAMES:
        base = AutoModelForCausalLM.from_pretrained(llama / "base", dtype=torch.float32)
        models[own] = PeftModel.from_pretrained(base, llama / own).merge_and_unload()
        if full:
            models[own].save_pretrained(tmp_path / own)
            content["specialists"][own] = {"model": str(tmp_path / own)}
    base = AutoModelForCausalLM.from_pretrained(llama / "base", dtype=torch.float32).model.layers
    folder = merge(content | {"output": {"format": "full", "dtype": "float32"}}, f"merged-{full}")
    merged = load_file(folder / "model.safetensors")
    for number, layer in enumerate(base):
        modules = [name for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)]
        assert len(modules) == 7
        read = {module: {} for module in modules}
        for own, model in models.items():

            def note(_, arguments, into):
                into[0][into[1]] = arguments[0].detach()[positions[into[1]]]

            handles = [
                model.model.layers[number]
                .get_submodule(module)
                .register_forward_pre_hook(lambda m, arguments, into=(read[module], own): note(m, arguments, into))
                for module in modules
            ]
            with torch.no_grad():
                model(inputs_embeds=probe["inputs_embeds"], attention_mask=probe["attention_mask"])
            for handle in handles:
                handle.remove()
        for module in modules:
            weight = layer.get_submodule(module).weight.detach()
            weights = {own: model.model.layers[number].get_submodule(module).weight for own, model in models.items()}
            deltas = [weights[own].detach() - weight for own in NAMES]
            inputs = [read[module][own] for own in NAMES]
            expected = 1.2 * normal_equations(deltas, [1 / 3] * 3, inputs, 0.8, trace=name == "embedding_matching")
            found = merged[f"model.layers.{number}.{module}.weight"]
            torch.testing.assert_close((found - weight).double(), expected, rtol=1e-3, atol=1e-4)
            for own in weights.values():
                own.data.copy_(found)


def test_of_many_positions_some_are_read(llama, merge, probed, monkeypatch):
    """Evenly spread over those of all inputs, if these differ in length."""
    content, read = probed(9, {"name": "embedding_matching", "terms": "equal"})
    tensors = load_file(llama / content["probe"]["tensors"])
    for place, name in enumerate(NAMES):
        tensors[f"mask.{name}"][0, 2 + 3 * place] = False
    save_file(tensors, llama / content["probe"]["tensors"])
    monkeypatch.setattr("esmerge.layer_inputs.READ_POSITIONS", 6)
    merged = load_file(merge(content) / "adapter_model.safetensors")
    kept = [place + 1 for place in range(17) if (place + 1) * 6 // 17 != place * 6 // 17]
    assert len(kept) == 6 and {2, 3} == {b - a for a, b in itertools.pairwise(kept)}
    few = {name: {module: x[kept] for module, x in own.items()} for name, own in read.items()}
    module = "model.layers.2.mlp.up_proj"
    b, a = (merged[f"base_model.model.{module}.lora_{letter}.weight"] for letter in "BA")
    expected = expected_of(llama, few, trace=True)[module]
    torch.testing.assert_close((b @ a).double(), expected, rtol=1e-3, atol=1e-4)


def test_terms_as_read_are_those_of_all_positions(llama, merge, probed, monkeypatch):
    """Of a modality of many positions some are read, and count for all of them."""
    content, read = probed(9, "embedding_matching")
    tensors = load_file(llama / content["probe"]["tensors"])
    tensors["mask.molecule"][:, 3] = False
    for name in ("protein", "cell"):
        tensors[f"mask.{name}"][0, 2 + 3 * NAMES.index(name)] = False
    save_file(tensors, llama / content["probe"]["tensors"])
    monkeypatch.setattr("esmerge.layer_inputs.READ_POSITIONS", 9)
    merged = load_file(merge(content) / "adapter_model.safetensors")
    module = "model.layers.2.mlp.up_proj"
    b, a = (merged[f"base_model.model.{module}.lora_{letter}.weight"] for letter in "BA")
    kept = [place + 1 for place in range(17) if (place + 1) * 9 // 17 != place * 9 // 17]
    assert len(kept) == 9
    # About one of two positions of protein and cell; the only one of molecule.
    inputs = [read["molecule"][module][::2], read["protein"][module][kept], read["cell"][module][kept]]
    adapters = {name: load_file(llama / name / "adapter_model.safetensors") for name in NAMES}
    factors = [f"base_model.model.{module}.lora_{letter}.weight" for letter in "BA"]
    deltas = [2 * adapters[name][factors[0]] @ adapters[name][factors[1]] for name in NAMES]
    expected = normal_equations(deltas, [1, 17 / 9, 17 / 9], inputs, 0.9, trace=False)
    torch.testing.assert_close((b @ a).double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("activations", ["specialist", "merged"])
def test_what_reads_the_same_is_solved_once(llama, merge, probed, tmp_path, monkeypatch, activations, full):
    """Queries, keys and values share a factorisation, as gate and up do; what the pass merged is not merged again."""
    content, _ = probed(5, {"name": "embedding_matching", "activations": activations})
    content["output"] = {"format": "full", "dtype": "float32"}
    if full:
        for name in NAMES:
            base = AutoModelForCausalLM.from_pretrained(llama / "base", dtype=torch.float32)
            PeftModel.from_pretrained(base, llama / name).merge_and_unload().save_pretrained(tmp_path / name)
        content["specialists"] = {name: {"model": str(tmp_path / name)} for name in NAMES}
    method, made = METHODS["embedding_matching"], []

    @wraps(method.match)
    def counted(*inputs, **parameters):
        made.append(1)
        return method.match(*inputs, **parameters)

    monkeypatch.setitem(METHODS, "embedding_matching", replace(method, match=counted))
    merged = merge(content)
    layers = LlamaConfig.from_pretrained(llama / "base").num_hidden_layers
    # The last layer's merge hands nothing on, and dense deltas are too large to be kept.
    again = 4 * (layers - 1) if full and activations == "merged" else 0
    assert len(made) == 4 * layers + again
    assert load_file(merged / "model.safetensors").keys() == load_file(llama / "base" / "model.safetensors").keys()


@pytest.fixture
def some_layers(llama, make_adapter):
    """Adapters that leave the first layer as it is, by name."""
    settings = {"r": 2, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1, 2]}
    return {
        name: {"model": str(make_adapter(llama / "base", llama / f"some-{name}", seed, **settings))}
        for seed, name in enumerate(NAMES)
    }


def test_layers_that_no_specialist_changes_hand_on_what_the_base_does(merge, probed, some_layers):
    """So the first layer that is merged reads the same whether layers read what merged ones hand on or not."""
    content, _ = probed(5, "embedding_matching")
    found = {}
    for activations in ("specialist", "merged"):
        method = {"name": "embedding_matching", "activations": activations}
        folder = merge(content | {"specialists": some_layers, "method": method}, activations)
        found[activations] = load_file(folder / "adapter_model.safetensors")
    ours, plain = found["merged"], found["specialist"]
    assert ours.keys() == plain.keys() and not any("layers.0." in name for name in ours)
    first = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    assert torch.equal(ours[first], plain[first])
    later = first.replace("layers.1", "layers.2")
    assert not torch.equal(ours[later], plain[later])


def test_the_scratch_file_has_what_is_read_in_the_probes_dtype_until_it_is_merged(llama, merge, probed, monkeypatch):
    sizes = []
    monkeypatch.setattr("esmerge.layer_inputs.READ_POSITIONS", 6)
    leave = Scratch.__exit__
    monkeypatch.setattr(Scratch, "__exit__", lambda self, *error: sizes.append(self.mark()) or leave(self, *error))
    for activations in ("specialist", "merged"):
        content, _ = probed(7, {"name": "embedding_matching", "activations": activations})
        content["probe"]["dtype"] = "bfloat16"
        merge(content, activations)
    config = LlamaConfig.from_pretrained(llama / "base")
    # Queries, keys and values read the same, as gate and up do.
    of_a_layer = len(NAMES) * 6 * 2 * (3 * config.hidden_size + config.intermediate_size)
    ranks = sum(PeftConfig.from_pretrained(llama / name).r for name in NAMES)
    kv = config.hidden_size * config.num_key_value_heads // config.num_attention_heads
    shapes = [config.hidden_size * 2, config.hidden_size + kv] * 2
    shapes += [config.hidden_size + config.intermediate_size] * 3
    factors = 4 * ranks * sum(shapes)
    layers = config.num_hidden_layers
    assert sizes == [of_a_layer * layers, factors * (layers - 1) + of_a_layer]


def test_matchers_that_are_shared_keep_their_room_until_the_last_tensor(merge, probed, monkeypatch):
    content, _ = probed(5, "embedding_matching")
    content["output"] = {"format": "full", "dtype": "float32"}
    method, alive, most = METHODS["embedding_matching"], weakref.WeakSet(), []

    @wraps(method.match)
    def slow(*inputs, **parameters):
        made = Kept(method.match(*inputs, **parameters))
        alive.add(made)
        most.append(len(alive))
        return made

    class Kept:
        def __init__(self, matching):
            self.matching = matching

        def __getattr__(self, name):
            time.sleep(0.005)
            return getattr(self.matching, name)

    monkeypatch.setitem(METHODS, "embedding_matching", replace(method, match=slow))
    # Of which half is used: each runs alone.
    monkeypatch.setattr("esmerge.writing.available_memory", lambda device: 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    try:
        merge(content)
    finally:
        torch.set_num_threads(threads)
    assert max(most) == 1


def probe_of(items, tails, batch_size=4):
    """A probe of one modality whose inputs have so many positions of an item and after it."""
    batches = []
    for start in range(0, len(items), batch_size):
        pairs = list(zip(items, tails, strict=True))[start : start + batch_size]
        length = 3 + max(map(sum, pairs))
        attention, mask = torch.zeros(len(pairs), length, dtype=torch.int64), torch.zeros(1, len(pairs), length)
        for row, (item, tail) in enumerate(pairs):
            attention[row, length - tail - item - 3 :] = 1
            mask[0, row, length - tail - item : length - tail] = 1
        batches.append(ProbeBatch(torch.zeros(len(pairs), length, 1), attention, mask.bool()))
    return Probe(("molecule",), batches)


@pytest.mark.parametrize(
    ("item", "tail", "item_read", "tail_read"),
    [(40, 10, 100, 100), (15, 10, 100, 100), (40, 4, 160, 40), (4, 40, 40, 160), (8, 10, 80, 100)],
)
def test_an_item_leaves_room_for_where_the_answer_begins(monkeypatch, item, tail, item_read, tail_read):
    """Each is thinned by itself, gets half the room at least, and counts for as much as it is long."""
    monkeypatch.setattr("esmerge.layer_inputs.READ_POSITIONS", 200)
    # Of unlike lengths, so that no position is left out to get out of step.
    items, tails = [item - 1, item + 1, *[item] * 8], [tail - 1, tail + 1, *[tail] * 8]
    probe = probe_of(items, tails)
    parts = [own["own_and_after"] for own in read_positions(probe, ["own_and_after"])]
    read = torch.cat([at.mask[0].flatten() for at in parts])
    own = torch.cat([batch.masks[0].flatten() for batch in probe.batches])
    attended = torch.cat([batch.attention_mask.flatten() for batch in probe.batches]).bool()
    assert bool((read <= attended).all())
    assert (int((read & own).sum()), int((read & ~own).sum())) == (item_read, tail_read)
    [stands_for] = parts[0].stands_for
    if 10 * (item + tail) <= 200:
        assert stands_for is None
        return
    assert float(stands_for[own[read]].sum()) == pytest.approx(10 * item)
    assert float(stands_for[~own[read]].sum()) == pytest.approx(10 * tail)


@pytest.mark.parametrize("count", [16, 24, 32])
def test_items_of_one_length_are_read_at_all_their_places(count):
    """Soft tokens have one length, and every how-maniest of all positions would be the same ones of each item."""
    probe = probe_of([576] * count, [0] * count)
    masks = [own["own"].mask[0, :, 3:] for own in read_positions(probe, ["own"])]
    read = torch.cat(masks)
    assert READ_POSITIONS - count < int(read.sum()) <= READ_POSITIONS
    assert bool(read.any(dim=0).all())


@pytest.mark.parametrize(
    "method",
    ["regmean", {"name": "regmean", "activations": "merged"}, {"name": "embedding_matching", "tokens": "all"}],
    ids=["regmean", "merged", "all"],
)
def test_a_specialist_that_overflows_is_named_wherever_it_is_read(llama, merge, probed, tmp_path, method):
    content, _ = probed(4, method)
    tensors = load_file(llama / content["probe"]["tensors"])
    # At a position of no modality, after molecule's.
    direction = torch.zeros(32)
    direction[0] = 1
    tensors["inputs_embeds"][:, 4] = 100 * direction
    save_file(tensors, llama / content["probe"]["tensors"])
    base = AutoModelForCausalLM.from_pretrained(llama / "base", dtype=torch.float32)
    base.model.layers[0].mlp.gate_proj.weight.data[:, 0] += 300
    base.model.layers[0].mlp.up_proj.weight.data[:, 0] += 300
    base.save_pretrained(tmp_path / "molecule")
    content["specialists"]["molecule"] = {"model": str(tmp_path / "molecule")}
    content["probe"]["dtype"] = "float16"
    content["output"] = {"format": "full"}
    with pytest.raises(InputError, match="embeddings of specialist molecule overflow at layer 0 in float16"):
        merge(content)


@pytest.mark.parametrize(("kind", "matters"), [("default", False), ("linear", False), ("dynamic", True)])
def test_bases_whose_positions_go_by_the_length_are_known(make_base, tmp_path, kind, matters):
    rope = {"rope_type": kind, "rope_theta": 10000.0} | ({} if kind == "default" else {"factor": 2.0})
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, rope_parameters=rope)
    make_base(config, tmp_path / "base")
    assert Backbone(tmp_path / "base", torch.float32, "cpu").length_matters is matters


def test_a_merged_model_that_overflows_is_one_sentence(llama, merge, probed):
    content, _ = probed(4, {"name": "regmean", "activations": "merged", "lambda": 1e30})
    with pytest.raises(InputError, match=r"merged model overflow at layer 0 in float32; lower method\.lambda\.$"):
        merge(content)


@pytest.mark.parametrize("activations", ["specialist", "merged"])
def test_a_specialist_with_values_that_are_none_is_named(llama, merge, probed, tmp_path, activations):
    content, _ = probed(4, {"name": "embedding_matching", "activations": activations})
    base = AutoModelForCausalLM.from_pretrained(llama / "base", dtype=torch.float32)
    base.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan
    base.save_pretrained(tmp_path / "protein")
    content["specialists"]["protein"] = {"model": str(tmp_path / "protein")}
    content["output"] = {"format": "full"}
    with pytest.raises(InputError, match=r"protein/.*tensor model\.layers\.1\.mlp\.up_proj\.weight has NaN"):
        merge(content)


@pytest.mark.parametrize("activations", ["specialist", "merged"])
def test_matrices_that_no_linear_layer_has_are_averaged_with_a_warning(merge, make_base, tmp_path, caplog, activations):
    make_base(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64), tmp_path / "base")
    random = torch.Generator().manual_seed(0)
    for name in NAMES:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        for layer in model.transformer.h:
            layer.attn.c_attn.weight.data += torch.randn(32, 96, generator=random)
        model.save_pretrained(tmp_path / name)
    probe = {
        "inputs_embeds": torch.randn(2, LENGTH, 32, generator=random),
        "attention_mask": torch.ones(2, LENGTH, dtype=torch.int64),
    }
    for place, name in enumerate(NAMES):
        probe[f"mask.{name}"] = (torch.arange(LENGTH) // 4 == place).expand(2, -1).contiguous()
    save_file(probe, tmp_path / "probe.safetensors")
    content = {
        "base": str(tmp_path / "base"),
        "specialists": {name: str(tmp_path / name) for name in NAMES},
        "coefficients": "uniform",
        "probe": {"tensors": str(tmp_path / "probe.safetensors")},
        "output": {"format": "full", "dtype": "float32"},
    }
    with caplog.at_level("WARNING"):
        matched, average = (
            load_file(merge(content | {"method": method}, method["name"]) / "model.safetensors")
            for method in ({"name": "embedding_matching", "activations": activations}, {"name": "linear"})
        )
    assert "embedding_matching averages 8 of 8 matrices, " in caplog.text
    for key, tensor in average.items():
        torch.testing.assert_close(matched[key], tensor)


def test_full_checkpoints_give_what_adapters_give(llama, merge, probed, tmp_path):
    """Deltas that are values are merged in blocks of rows, low-rank ones by their factors."""
    content, read = probed(4, "embedding_matching")
    content["output"] = {"format": "full"}
    found = load_file(merge(content, "of-adapters") / "model.safetensors")
    for name in NAMES:
        base = AutoModelForCausalLM.from_pretrained(llama / "base", dtype=torch.float32)
        PeftModel.from_pretrained(base, llama / name).merge_and_unload().save_pretrained(tmp_path / name)
        content["specialists"][name] = {"model": str(tmp_path / name)}
    other = load_file(merge(content, "of-values") / "model.safetensors")
    base = load_file(llama / "base" / "model.safetensors")
    for module, delta in expected_of(llama, read, trace=False).items():
        for merged in (found, other):
            change = (merged[f"{module}.weight"] - base[f"{module}.weight"]).double()
            torch.testing.assert_close(change, delta, rtol=1e-3, atol=1e-4)
    # What no specialist changes is the base's.
    assert torch.equal(found["model.norm.weight"], base["model.norm.weight"])


def test_signals_can_weigh_the_terms(llama, merge, probed):
    content, read = probed(4, {"name": "embedding_matching", "shrink": 0.5})
    content["coefficients"] = {"from": "embedding_signals", "granularity": "layer", "projections": 32}
    folder = merge(content)
    alpha = load_file(folder / "coefficients.safetensors")["alpha"]
    merged = load_file(folder / "adapter_model.safetensors")
    adapters = {name: load_file(llama / name / "adapter_model.safetensors") for name in NAMES}
    module = "model.layers.1.mlp.down_proj"
    b, a = (f"base_model.model.{module}.lora_{letter}.weight" for letter in "BA")
    deltas = [2 * adapters[name][b] @ adapters[name][a] for name in NAMES]
    inputs = [read[name][module] for name in NAMES]
    expected = normal_equations(deltas, alpha[:, 1].tolist(), inputs, 0.5, False)
    torch.testing.assert_close((merged[b] @ merged[a]).double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"probe": None}, "probe is missing; method embedding_matching needs what the specialists read in one"),
        ({"space": "factors"}, "space: method embedding_matching merges weights; leave space out"),
        ({"coefficients": {"from": "embedding_signals"}}, "granularity: method embedding_matching takes one number"),
        ({"method": {"name": "embedding_matching", "shrink": 1.0}}, "shrink"),
        ({"method": {"name": "embedding_matching", "tokens": "some"}}, "tokens"),
        ({"method": {"name": "embedding_matching", "terms": "some"}}, "terms"),
        ({"method": {"name": "regmean", "tokens": "own"}}, "tokens"),
        (
            {
                "coefficients": {"from": "embedding_signals", "granularity": "layer"},
                "probe": {"samples": 5, "template": OWN_TEMPLATES, "data": {}},
            },
            "probe.template: coefficients from embedding signals compare what all make of the same prompt",
        ),
        (
            {"probe": {"samples": 5, "template": {"cell": ["{cell}", 3]}, "data": {}}},
            "probe.template: ['{cell}', 3] is no template; give one text in quotes, or one or several by each",
        ),
        (
            {"probe": {"samples": 5, "template": {"cell": {"cell": None}}, "data": {}}},
            "probe.template: {'cell': None} is no template; give one text in quotes",
        ),
        (
            {"probe": {"samples": 5, "template": {1: "{cell}"}, "data": {}}},
            "probe.template: '{cell}' is no template; give one text in quotes, or one or several",
        ),
        (
            {"probe": {"samples": 1, "template": OWN_TEMPLATES, "data": dict.fromkeys(NAMES, "a.txt")}},
            "probe.template.cell has 2 templates, but probe.samples is 1: ask for as many samples at least",
        ),
        (
            {"probe": {"samples": 5, "template": OWN_TEMPLATES | {"cell": []}, "data": dict.fromkeys(NAMES, "a.txt")}},
            "probe.template.cell is empty; give at least one template with {cell} in it",
        ),
        (
            {
                "probe": {
                    "samples": 5,
                    "template": OWN_TEMPLATES | {"cell": ["{cell}", "{cell} of {protein}"]},
                    "data": dict.fromkeys(NAMES, "a.txt"),
                }
            },
            "probe.template.cell has the placeholder {protein}, but cell reads prompts of its own: leave only {cell}",
        ),
        (
            {
                "probe": {
                    "samples": 5,
                    "template": {name: f"{{{name}}}" for name in NAMES[:2]},
                    "data": dict.fromkeys(NAMES, "a.txt"),
                }
            },
            "probe.template has no modality cell, which the specialist cell needs",
        ),
        (
            {
                "coefficients": {"from": "embedding_signals", "granularity": "layer"},
                "method": {"name": "embedding_matching", "activations": "merged"},
            },
            "method.activations: merged layers are needed before signals are known; use specialist, or numbers",
        ),
    ],
)
def test_what_does_not_fit_is_one_sentence(llama, recipe, esmerge, tmp_path, change, said):
    content = recipe | {"coefficients": "uniform", "method": "embedding_matching"} | change
    content = {key: value for key, value in content.items() if value is not None}
    content["base"] = str(llama / "base")
    content["specialists"] = {name: {"model": str(llama / name)} for name in NAMES}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    code, _, err = esmerge("merge", tmp_path / "recipe.yaml", "-o", tmp_path / "merged", "--quiet")
    assert (code, err.count("\n")) == (2, 1)
    assert said in err
    assert not (tmp_path / "merged").exists()


def test_comparisons_of_prompts_of_ones_own_have_a_plain_merges_bits(llama, recipe, merge, esmerge, tmp_path):
    content = recipe | {"coefficients": "uniform", "method": "regmean"}
    content["probe"] = content["probe"] | {"template": OWN_TEMPLATES}
    (llama / "own.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    methods = ["regmean", "embedding_matching", "{name: embedding_matching, tokens: own}", "linear"]
    options = [word for method in methods for word in ("--method", method)]
    code, _, err = esmerge("compare", llama / "own.yaml", "-o", tmp_path / "compared", "--quiet", *options)
    assert code == 0, err
    for folder in (tmp_path / "compared").iterdir():
        record = yaml.safe_load((folder / "esmerge.yaml").read_text())
        alone = merge(content | {"method": record["recipe"]["method"]}, f"alone-{folder.name}")
        weights = [(own / "adapter_model.safetensors").read_bytes() for own in (folder, alone)]
        assert weights[0] == weights[1], folder.name


def test_several_methods_are_compared_with_one_probe(llama, probed, esmerge, tmp_path):
    content, _ = probed(4, "linear")
    content["base"] = str(llama / "base")
    content["specialists"] = {name: {"model": str(llama / name)} for name in NAMES}
    content["probe"]["tensors"] = str(llama / content["probe"]["tensors"])
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    methods = ["linear", "embedding_matching", "{name: embedding_matching, tokens: all, terms: equal}", "regmean"]
    methods += ["{name: embedding_matching, terms: equal}", "{name: embedding_matching, tokens: own_and_after}"]
    methods += ["{name: embedding_matching, activations: merged}", "{name: regmean, activations: merged}"]
    options = [word for method in methods for word in ("--method", method)]
    code, _, err = esmerge("compare", tmp_path / "recipe.yaml", "-o", tmp_path / "compared", "--quiet", *options)
    assert code == 0, err
    folders = sorted((tmp_path / "compared").iterdir())
    assert len(folders) == len(methods)
    merged = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    # The first layer has none before it.
    key = next(name for name in merged[0] if "layers.1" in name and "lora_A" in name)
    assert len({tensors[key].numpy().tobytes() for tensors in merged}) == len(methods)
