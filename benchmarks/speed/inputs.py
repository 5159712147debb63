"""What every variant works on: a probe of real items and three random adapters, made once in a folder.

`python -m benchmarks.speed.inputs FOLDER --base BASE`
"""

import argparse
from pathlib import Path

from esmerge.backbone import Backbone
from esmerge.checkpoint import Checkpoint
from esmerge.probe import Probe, read_tensors, text_probe
from esmerge.results import write_tensors

MODALITIES = ("molecule", "protein", "cell")
PROBE_FILE = "probe.safetensors"
TEMPLATE = "Molecule: {molecule}\nProtein: {protein}\nCell: {cell}"


def prepare(folder: Path, base: Path, samples: int) -> None:
    """Write a probe of held-out items of the testbed's tasks, and an adapter per modality, into `folder`."""
    from transformers import AutoTokenizer

    from benchmarks.speed.random_models import write_adapter
    from benchmarks.testbed.data import load_task

    for seed, name in enumerate(MODALITIES):
        write_adapter(folder / name, base, seed)
    data = {name: [example.item for example in load_task(name).examples["test"][:samples]] for name in MODALITIES}
    # One batch, so that all inputs are padded to one length, as a file of ready tensors has them.
    tokenizer = AutoTokenizer.from_pretrained(base)
    batch = text_probe(tokenizer, [TEMPLATE], data, Backbone(base).embed, batch_size=samples).batches[0]
    masks = {f"mask.{name}": mask for name, mask in zip(MODALITIES, batch.masks, strict=True)}
    embeds = {"inputs_embeds": batch.inputs_embeds, "attention_mask": batch.attention_mask}
    write_tensors(folder / PROBE_FILE, {**embeds, **masks})
    lengths = batch.attention_mask.sum(dim=1)
    print(f"{samples} probe inputs of {lengths.min()} to {lengths.max()} tokens, {lengths.sum()} in all")


def read_probe(folder: Path, batch_size: int) -> Probe:
    """The probe in `folder`, in batches cut as esmerge cuts them: all variants see the same tokens."""
    file = folder / PROBE_FILE
    hidden_size = Checkpoint({file: None}).info("inputs_embeds").shape[-1]
    return read_tensors(file, MODALITIES, batch_size, hidden_size)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=32)
    options = parser.parse_args()
    prepare(options.folder, options.base, options.samples)


if __name__ == "__main__":
    main()
