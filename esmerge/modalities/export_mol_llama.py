"""Export the features of molecules from Mol-LLaMA's own environment, for the modality `cached`.

Mol-LLaMA (github.com/DongkiKim95/Mol-LLaMA) needs transformers 4.43 and Uni-Core. Copy this one file there (it needs
torch and safetensors, nothing of esmerge) and run it in the folder of its repository:

    python export_mol_llama.py path/to/Mol-Llama-3.1-8B-Instruct smiles.txt features.safetensors

`smiles.txt` has one SMILES in each line. The file that is written holds, under each SMILES, the vectors of the
Q-Former, float32 [8, 768]. In a recipe of esmerge it is the specialist's `features`:

    specialists:
      molecule: {model: path/to/Mol-Llama-3.1-8B-Instruct, features: features.safetensors}

Features of any other encoder are exported alike: one tensor [n, width] for each item, under the item's own text, with
`write_features`.
"""

import os
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List  # noqa: UP035  # as old Python has them

import torch
from safetensors import safe_open
from safetensors.torch import save_file

_ENCODER = "encoder."
# What the package downloads if the checkpoint does not have it, and buffers that count up.
_MAY_LACK = ("graph_encoder.", "Qformer.bert.embeddings.position_ids")


def write_features(encode: Callable[[str], torch.Tensor], items: Iterable[str], file: Path) -> int:
    """Encode items and write their features; returns how many there are.

    Args:
        encode: gives the features of an item, [n, width].
        file: where they go; it is written whole or not at all.
    """
    features: Dict[str, torch.Tensor] = {}  # noqa: UP006
    with torch.no_grad():
        for item in items:
            if item and item not in features:
                features[item] = encode(item).to("cpu", torch.float32).clone().contiguous()
    part = file.with_name(file.name + ".part")
    save_file(features, str(part))
    os.replace(str(part), str(file))  # noqa: PTH105
    return len(features)


def mol_llama_encoder(folder: Path, device: str = "cpu") -> Callable[[str], torch.Tensor]:
    """Mol-LLaMA's encoder with the weights of a checkpoint: SMILES -> [8, 768]. Its LLM is not loaded."""
    from models.mol_llama import get_mol_graphs  # type: ignore[import-not-found]
    from models.mol_llama_encoder import MolLLaMAEncoder  # type: ignore[import-not-found]
    from utils.configuration_mol_llama import MolLLaMAConfig  # type: ignore[import-not-found]

    config = MolLLaMAConfig.from_pretrained(str(folder))
    encoder: Any = MolLLaMAEncoder(
        graph_encoder_config=config.graph_encoder_config,
        blending_module_config=config.blending_module_config,
        qformer_config=config.qformer_config,
    )
    # As MolLLaMA does: what only pretraining needs goes.
    former = encoder.Qformer
    former.cls = former.bert.embeddings.word_embeddings = former.bert.embeddings.position_embeddings = None
    for layer in former.bert.encoder.layer:
        layer.output = layer.intermediate = None
    encoder.graph_proj = encoder.text_proj = encoder.gtm_head = None
    weights: Dict[str, torch.Tensor] = {}  # noqa: UP006
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # it is no mapping
                if name.startswith(_ENCODER):
                    weights[name[len(_ENCODER) :]] = tensors.get_tensor(name)
    missing, unexpected = encoder.load_state_dict(weights, strict=False)
    faults = [*unexpected, *(name for name in missing if not name.startswith(_MAY_LACK))]
    if faults or not weights:
        raise SystemExit("{}: the encoder does not fit Mol-LLaMA's package: {}".format(folder, faults[:3]))  # noqa: UP032
    encoder.to(device).eval()

    def encode(smiles: str) -> torch.Tensor:
        try:
            graphs = get_mol_graphs([smiles], encoder.unimol_dictionary, device)
        # The package leaves out what it finds no conformer of, and fails without any molecule in one way or another.
        except Exception as error:
            raise SystemExit("no conformer was found of {}: leave it out".format(smiles)) from error  # noqa: UP032
        features: torch.Tensor = encoder.graph_forward(graphs)[2].last_hidden_state[0]
        return features

    return encode


def main(arguments: List[str]) -> None:  # noqa: UP006
    """Run the script."""
    if len(arguments) != 3:
        raise SystemExit("usage: python export_mol_llama.py CHECKPOINT_FOLDER SMILES_FILE FEATURES_FILE")
    folder, items, file = map(Path, arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines = [line.strip() for line in items.read_text(encoding="utf-8").splitlines()]
    count = write_features(mol_llama_encoder(folder, device), lines, file)
    sys.stdout.write("{}: features of {} molecules\n".format(file, count))  # noqa: UP032


if __name__ == "__main__":
    # The package lies in the folder that this is run in.
    sys.path.insert(0, str(Path.cwd()))
    main(sys.argv[1:])
