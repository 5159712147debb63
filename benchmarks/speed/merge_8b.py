"""Merges three adapters of a model of Llama 3.1 8B's shape, with random weights, and reports time and memory.

Needs 17 GB of disk in the folder given, which is empty again at the end.

    python -m benchmarks.speed.merge_8b /path/with/room
"""

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.speed.inputs import MODALITIES
from benchmarks.speed.measure import Usage, machine, markdown_table, run_measured
from benchmarks.speed.random_models import write_adapter, write_llama
from esmerge.results import write_tensors

LLAMA_3_1_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "max_position_embeddings": 131072,
}
_SIGNALS = {"from": "embedding_signals", "granularity": "both"}
_MATCHING = {"name": "embedding_matching"}
# What the recipe says about each way to merge.
WAYS: dict[str, dict[str, Any]] = {
    "factors": {"coefficients": _SIGNALS, "space": "factors"},
    "weights": {"coefficients": _SIGNALS, "space": "weights"},
    "matching": {"coefficients": "uniform", "method": _MATCHING},
    "matching-merged": {"coefficients": "uniform", "method": _MATCHING | {"activations": "merged"}},
}


def prepare(folder: Path, inputs: int, positions: int) -> None:
    """Write the base, the adapters and a probe of ready tensors into `folder`."""
    base = folder / "base"
    write_llama(base, seed=0, **LLAMA_3_1_8B)
    for seed, name in enumerate(MODALITIES):
        write_adapter(folder / name, base, seed)
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(inputs, positions, LLAMA_3_1_8B["hidden_size"], generator=generator) * 0.02
    attention = torch.ones(inputs, positions, dtype=torch.long)
    # Each modality has a third of the positions.
    owner = torch.arange(positions) * len(MODALITIES) // positions
    masks = {f"mask.{name}": (owner == i).expand(inputs, -1) for i, name in enumerate(MODALITIES)}
    write_tensors(folder / "probe.safetensors", {"inputs_embeds": embeds, "attention_mask": attention, **masks})


def merge(folder: Path, way: str) -> Usage:
    """Run the merge as anyone would, and measure the process from outside."""
    recipe = {
        "base": "base",
        "specialists": {name: {"model": name} for name in MODALITIES},
        "probe": {"tensors": "probe.safetensors"},
        **WAYS[way],
    }
    (folder / f"{way}.yaml").write_text(yaml.safe_dump(recipe))
    esmerge = [sys.executable, "-c", "from esmerge.cli import main; main()"]
    return run_measured([*esmerge, "merge", f"{way}.yaml", "-o", f"merged-{way}"], folder)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where there is room for the checkpoint")
    parser.add_argument("--inputs", type=int, default=4, help="number of probe inputs (%(default)s)")
    parser.add_argument("--positions", type=int, default=48, help="of each probe input (%(default)s)")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS), help="to merge")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint and the results in the folder")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="merge-8b-", dir=options.folder))
    try:
        prepare(folder, options.inputs, options.positions)
        usages = {way: merge(folder, way) for way in options.ways}
    finally:
        if not options.keep:
            shutil.rmtree(folder)
    rows = []
    for way, usage in usages.items():
        memory = [f"{size / 1e9:.2f} GB" for size in (usage.peak_rss, usage.peak_anonymous)]
        rows.append([way, f"{usage.seconds:.0f} s", *memory])
    print(f"\n{machine()}\n")
    print(markdown_table(["way", "time", "peak resident memory", "of it anonymous"], rows))
    if options.json:
        figures = {"machine": machine(), "ways": {way: asdict(usage) for way, usage in usages.items()}}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
