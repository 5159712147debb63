"""The three specialists: what each is trained on and how, and where the trained ones are."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.testbed.data import Modality
from esmerge.errors import InputError
from esmerge.modalities import Modality as Encoding
from esmerge.modalities.registry import modality_from_settings

# The id under which the base is published; the testbed uses a conversion of it that a package ships.
BASE_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
FOLDER = Path(__file__).parent / "specialists"
# Beside each: how it was trained.
RECORD = "training.json"
# The task (in benchmarks/tasks) that each learns.
TASKS: dict[Modality, str] = {"molecule": "b3db", "protein": "antimicrobial", "cell": "tissue"}


@dataclass(frozen=True)
class TrainingPlan:
    """Everything about one training run that is not data.

    Attributes:
        settings: of the modality, as the registry of modalities takes them.
    """

    epochs: int
    settings: dict[str, Any]
    learning_rate: float = 1e-3
    encoder_learning_rate: float = 1e-3
    batch_size: int = 16
    warmup_share: float = 0.1
    rank: int = 4
    alpha: int = 8
    seed: int = 42


PLANS: dict[Modality, TrainingPlan] = {
    "molecule": TrainingPlan(
        epochs=2,
        settings={"kind": "fingerprint", "placeholder": "<mol>", "n_bits": 2048, "tokens": 8, "intermediate_size": 128},
    ),
    "protein": TrainingPlan(
        epochs=1,
        settings={
            "kind": "esm",
            "placeholder": "<protein>",
            "intermediate_size": 256,
            "dropout": 0.1,
            # ESM-2 in small, from scratch: pretrained ones are downloads.
            "encoder": {
                "model_type": "esm",
                "vocab_size": 33,
                "pad_token_id": 1,
                "mask_token_id": 32,
                "hidden_size": 96,
                "num_hidden_layers": 3,
                "num_attention_heads": 6,
                "intermediate_size": 384,
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
                "max_position_embeddings": 1026,
                "position_embedding_type": "rotary",
                "emb_layer_norm_before": False,
                "token_dropout": False,
            },
        },
    ),
    "cell": TrainingPlan(epochs=4, settings={"kind": "text", "placeholder": "<cell>"}),
}


def encoding(modality: Modality, plan: TrainingPlan) -> dict[str, Encoding]:
    """The modality of a plan by its name, for a processor."""
    return {modality: modality_from_settings(plan.settings, f"the plan of {modality}")}


def specialist_folders(parent: Path = FOLDER) -> dict[str, Path]:
    """The trained specialists by modality, each in a folder of `parent`.

    Raises:
        InputError: if one is missing.
    """
    folders: dict[str, Path] = {modality: parent / modality for modality in PLANS}
    for modality, folder in folders.items():
        if not folder.is_dir():
            raise InputError(
                f"{folder} is missing: train it with `python -m benchmarks.testbed.train --modality {modality}`."
            )
    return folders
