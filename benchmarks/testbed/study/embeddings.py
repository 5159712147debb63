"""How near a merged model's embeddings of the probe are to each specialist's own: what can be known without labels."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.testbed.base_model import base_to_load
from benchmarks.testbed.data import MODALITIES
from benchmarks.testbed.study.merges import EXACT, PROBE_SAMPLES, recipe_of
from benchmarks.testbed.study.places import Places
from benchmarks.testbed.study.rows import row
from esmerge.backbone import Backbone
from esmerge.mllm.loading import load_model
from esmerge.plan import make_plan
from esmerge.probe import Probe
from esmerge.probing import make_probes
from esmerge.records import pinned_inputs
from esmerge.results import write_tensors

# By modality, at the positions of its items: [n, H] float32.
Embeddings = Mapping[str, Tensor]


def embedding_gap(merged: Embeddings, specialists: Embeddings, base: Embeddings) -> float:
    """The squared distance to each specialist at its own modality's positions, relative to the base's; their mean.

    0 for a model that does to every modality what its specialist does, 1 for the base.
    """
    gaps = [
        float((merged[name] - own).square().sum() / (base[name] - own).square().sum())
        for name, own in specialists.items()
    ]
    return fmean(gaps)


class GapMeter:
    """Measures merged models of the specialists of one training.

    What base and specialists make of the probe is computed once and kept.
    """

    def __init__(self, places: Places, base: Path, seed: int) -> None:
        self._base = base
        # Any row that is probed has a probe. Of other items than the ones that methods match.
        own = row("embedding_matching")
        setting = next(iter(own.variants.values()))
        recipe = recipe_of(places, base, seed, own, setting, EXACT, PROBE_SAMPLES, first=PROBE_SAMPLES)
        plan = make_plan(recipe)
        [self._probe] = make_probes(plan, Backbone(base, torch.float32, "cpu", plan.checkpoint))
        # Of other specialists, or another probe, they would be others.
        digest = hashlib.blake2b(json.dumps(pinned_inputs(plan), sort_keys=True).encode(), digest_size=8).hexdigest()
        file = places.embeddings(seed, digest)
        if not file.exists():
            kept = {f"base.{name}": states for name, states in last_states(base, base, self._probe).items()}
            for name in MODALITIES:
                kept[f"specialist.{name}"] = last_states(places.model(seed, name), base, self._probe)[name]
            # Other jobs may be doing the same.
            own_file = file.with_stem(f"{file.stem}-{os.getpid()}")
            write_tensors(own_file, kept)
            own_file.replace(file)
        known = load_file(file)
        self._references: dict[str, Tensor] = {name: known[f"base.{name}"] for name in MODALITIES}
        self._specialists: dict[str, Tensor] = {name: known[f"specialist.{name}"] for name in MODALITIES}

    def __call__(self, model: Path) -> float:
        """The gap of the merged model in a folder."""
        return embedding_gap(last_states(model, self._base, self._probe), self._specialists, self._references)


@torch.inference_mode()
def last_states(model: Path, base: Path, probe: Probe) -> dict[str, Tensor]:
    """A model's last hidden states of the probe, by modality."""
    llm: Any = load_model(model, base_to_load(model, base), torch.float32)[0].language_model
    parts: dict[str, list[Tensor]] = {name: [] for name in probe.modalities}
    for batch in probe.batches:
        output = llm(
            inputs_embeds=batch.inputs_embeds,
            attention_mask=batch.attention_mask,
            output_hidden_states=True,
            use_cache=False,
            logits_to_keep=1,
        )
        for name, mask in zip(probe.modalities, batch.masks, strict=True):
            parts[name].append(output.hidden_states[-1][mask])
    return {name: torch.cat(own) for name, own in parts.items()}
