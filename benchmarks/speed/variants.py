"""The procedures that `coefficients.py` compares; each runs in a process of its own.

`python -m benchmarks.speed.variants NAME FOLDER --base BASE` runs one on what `inputs.py` put into FOLDER. It writes
NAME.json (seconds of each phase) and, where coefficients are found, NAME.safetensors into FOLDER.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.speed.inputs import MODALITIES, PROBE_FILE, read_probe
from esmerge.coefficients import combine, element_coefficients, layer_coefficients
from esmerge.distances import random_directions, sliced_wasserstein, standardize_together
from esmerge.names import canonical_name, layer_of
from esmerge.plan import make_plan
from esmerge.plan_merger import make_merger
from esmerge.probe import Probe, ProbeBatch
from esmerge.probing import measure_signals
from esmerge.recipe import parse_recipe
from esmerge.results import write_tensors
from esmerge.scores import Scratch, row_blocks
from esmerge.signals import SignalSettings

OWN = range(len(MODALITIES))
SETTINGS = SignalSettings()


@dataclass
class Run:
    """One run of one variant: its inputs, and what it took and found.

    Attributes:
        seconds: of each phase.
        found: tensors in which variants must agree.
    """

    folder: Path
    base: Path
    dtype_name: str
    batch_size: int
    seconds: dict[str, float] = field(default_factory=dict)
    found: dict[str, Tensor] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """In which the models run."""
        dtype: torch.dtype = getattr(torch, self.dtype_name)
        return dtype

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Take the time of a block."""
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start

    def probe(self) -> Probe:
        return read_probe(self.folder, self.batch_size)

    def model(self, adapter: str | None = None) -> Any:
        """The base, or a specialist: a copy of the base with an adapter of the same dtype."""
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.base, dtype=self.dtype)
        if adapter:
            # By default PEFT keeps the factors of a bfloat16 model in float32, which would cost it time and memory.
            folder = self.folder / adapter
            model = PeftModel.from_pretrained(model, folder, adapter, is_trainable=True, autocast_adapter_dtype=False)
        return model.eval()


def imports(run: Run) -> None:
    """What every other variant starts from."""
    with run.phase("load"):
        _import_transformers()


def _import_transformers() -> None:
    import transformers

    # The names of the package are imported when they are first looked up.
    assert transformers.LlamaForCausalLM


def forward(run: Run, logits: bool) -> None:
    """The floor: the probe goes through the base and the specialists, as anyone would write it."""
    with run.phase("load"):
        model = run.model(MODALITIES[0])
        for name in MODALITIES[1:]:
            model.load_adapter(run.folder / name, name, autocast_adapter_dtype=False)
        probe = run.probe()

    def push() -> None:
        for batch in probe.batches:
            model(**_arguments(batch, run.dtype), logits_to_keep=0 if logits else 1)

    with run.phase("work"), torch.no_grad():
        with model.disable_adapter():
            push()
        for name in MODALITIES:
            model.set_adapter(name)
            push()


def paper(run: Run, new_tokens: int) -> None:
    """The procedure of the paper's code: four models in memory, the probe twice, each graph kept for all layers."""
    with run.phase("load"):
        base, *specialists = [run.model(), *map(run.model, MODALITIES)]
        probe = run.probe()
    with run.phase("work"):
        responses = [_responses(model, probe, run.dtype, new_tokens) for model in (base, *specialists)]
        directions = random_directions(SETTINGS.projections, responses[0].shape[-1], SETTINGS.seed)
        distances = torch.zeros(len(specialists), len(MODALITIES), responses[0].shape[1], dtype=torch.float64)
        for i, t, layer in torch.cartesian_prod(*map(torch.arange, distances.shape)).tolist():
            pair = standardize_together(responses[0][t, layer].double(), responses[1 + i][t, layer].double())
            distances[i, t, layer] = sliced_wasserstein(*pair, directions, SETTINGS.p)
        alpha = layer_coefficients(distances, OWN)
        scores = _gradient_scores(base, specialists, probe, run.dtype)
        for name in scores[0]:
            stacked = torch.stack([score[name] for score in scores])
            flat = stacked.flatten(1)
            element = element_coefficients(stacked, flat.mean(dim=1), flat.std(dim=1, correction=0))
            combine(alpha[:, layer_of(name)], element)
    run.found = {"distances": distances, "alpha": alpha}
    for modality, score in zip(MODALITIES, scores, strict=True):
        run.found |= {f"score.{modality}.{name}": tensor for name, tensor in score.items()}


def _arguments(batch: ProbeBatch, dtype: torch.dtype) -> dict[str, Any]:
    embeds = batch.inputs_embeds.to(dtype)
    return {"inputs_embeds": embeds, "attention_mask": batch.attention_mask, "use_cache": False}


def _responses(model: Any, probe: Probe, dtype: torch.dtype, new_tokens: int) -> Tensor:
    """Mean embeddings of each modality after each layer, float32 [M, L, K, H], from a pass that also generates."""
    unnormed: list[Tensor] = []
    # The last of the states that a model returns has been through the final norm.
    hook = _layers(model)[-1].register_forward_hook(lambda *call: unnormed.append(call[-1]))
    generation = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "use_cache": True}
    pooled = []
    for batch in probe.batches:
        arguments = _arguments(batch, dtype) | {"output_hidden_states": True}
        unnormed.clear()
        with torch.no_grad():
            if new_tokens:
                output = model.generate(**arguments | generation, return_dict_in_generate=True)
                states = output.hidden_states[0]
            else:
                states = model(**arguments, logits_to_keep=1).hidden_states
        stacked = torch.stack([*states[1:-1], unnormed[0]]).float()
        weights = batch.masks / batch.masks.sum(dim=-1, keepdim=True)
        pooled.append(torch.einsum("mbt,lbth->mlbh", weights, stacked))
    hook.remove()
    return torch.cat(pooled, dim=2)


def _gradient_scores(
    base: Any, specialists: Sequence[Any], probe: Probe, dtype: torch.dtype
) -> list[dict[str, Tensor]]:
    """Sums of absolute gradients of each layer's distance, by the name of the factor, per specialist."""
    leaves = [_leaves(model) for model in specialists]
    scores = [{name: torch.zeros(leaf.shape) for layer in own for name, leaf in layer.items()} for own in leaves]
    for batch in probe.batches:
        arguments = _arguments(batch, dtype) | {"output_hidden_states": True, "logits_to_keep": 1}
        with torch.no_grad():
            base_states = base(**arguments).hidden_states
        for i, specialist in enumerate(specialists):
            mask = batch.masks[i]
            states = specialist(**arguments).hidden_states
            for layer, own in enumerate(leaves[i], start=1):
                gap = states[layer][mask].float() - base_states[layer][mask].float()
                gradients = torch.autograd.grad(gap.square().mean(), list(own.values()), retain_graph=True)
                for name, gradient in zip(own, gradients, strict=True):
                    scores[i][name] += gradient.abs()
    return scores


def _layers(model: Any) -> torch.nn.ModuleList:
    return next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))


def _leaves(model: Any) -> list[dict[str, Tensor]]:
    """The factors of each layer, by the names that esmerge gives them."""
    leaves: list[dict[str, Tensor]] = [{} for _ in _layers(model)]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            module, letter = canonical_name(name).split(".lora_")
            canonical = f"{module}.lora_{letter[0].lower()}.weight"
            leaves[layer_of(canonical) or 0][canonical] = parameter
    return leaves


def ours(run: Run, space: Literal["factors", "weights"]) -> None:
    """esmerge: one pass over the layers, then the coefficients of every element of every tensor."""
    with run.phase("load"):
        _import_transformers()
        recipe = {
            "base": str(run.base),
            "specialists": {name: name for name in MODALITIES},
            "probe": {"tensors": PROBE_FILE, "batch_size": run.batch_size, "dtype": run.dtype_name},
            "coefficients": "embedding_signals",
            "space": space,
        }
        plan = make_plan(parse_recipe(recipe, run.folder))
    with Scratch(run.folder) as scratch, run.phase("work"):
        signals = measure_signals(plan, scratch, progress=False)
        coefficients = make_merger(plan, signals).coefficients
        for name, scores in signals.scores.items():
            rows = coefficients.rows(name, layer_of(name))
            for start, stop in row_blocks(scores[0].shape):
                rows(start, stop)
    run.found = {"distances": signals.distances, "alpha": layer_coefficients(signals.distances, OWN)}
    if space == "factors":
        for name, scores in signals.scores.items():
            for modality, score in zip(MODALITIES, scores, strict=True):
                run.found[f"score.{modality}.{name}"] = score.rows(0, score.shape[0])


VARIANTS: dict[str, Callable[[Run], None]] = {
    "imports": imports,
    "forward": partial(forward, logits=True),
    "forward-no-logits": partial(forward, logits=False),
    "paper-0": partial(paper, new_tokens=0),
    "paper-16": partial(paper, new_tokens=16),
    "esmerge-factors": partial(ours, space="factors"),
    "esmerge-weights": partial(ours, space="weights"),
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch-size", type=int, default=2)
    options = parser.parse_args()
    run = Run(options.folder, options.base, options.dtype, options.batch_size)
    VARIANTS[options.variant](run)
    if run.found:
        write_tensors(options.folder / f"{options.variant}.safetensors", run.found)
    (options.folder / f"{options.variant}.json").write_text(json.dumps(run.seconds))


if __name__ == "__main__":
    main()
