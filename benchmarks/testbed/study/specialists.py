"""What the study's specialists learn, and how: recipes of `esmerge finetune` and what they start from."""

from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.testbed.cache import building
from benchmarks.testbed.data import MODALITIES, Modality
from benchmarks.testbed.specialists import BASE_ID, PLANS
from esmerge.modalities import Encoder
from esmerge.modalities.modality import Modality as Encoding
from esmerge.modalities.modality import with_encoder
from esmerge.modalities.registry import MODALITIES_FOLDER, modality_from_settings, save_encoder, save_modality
from lightning_modules.tasks import load_task

LESSONS = Path(__file__).parent.parent / "lessons"
SEEDS = (42, 43, 44)
# The specialists of 43 were lost before their average was trained further. Those of one more training stand in for them
# there, and in nothing that ranks merges: they were made when all ranks were known.
TUNED_SEEDS = (42, 44, 45)
TRAININGS = tuple(dict.fromkeys((*SEEDS, *TUNED_SEEDS)))
RANK = 8

# Beside its task, what each side of the pairs of the cross-modality tasks tells by itself.
TASKS: dict[Modality, tuple[str, ...]] = {
    "molecule": ("b3db", f"{LESSONS / 'drug_potency.yaml'}", f"{LESSONS / 'ligand_binding.yaml'}"),
    "protein": ("antimicrobial", f"{LESSONS / 'target_binding.yaml'}"),
    "cell": ("tissue", "cell_sensitivity"),
}
# Chosen for the time that training takes: half an hour to an hour each, on one core.
_EPOCHS: dict[Modality, int] = {"molecule": 3, "protein": 4, "cell": 4}
_BATCH_SIZES: dict[Modality, int] = {"molecule": 16, "protein": 8, "cell": 8}
# Of few proteins.
_REPEAT: dict[Modality, dict[str, int]] = {"molecule": {}, "protein": {"target_binding": 2}, "cell": {}}
_SAMPLES: dict[Modality, int] = {"molecule": 1200, "protein": 1600, "cell": 700}
# As text: of so few proteins, an encoder that starts from nothing learns less. Most tokens would be of a few long ones.
_LONGEST_PROTEIN = 64


def own_prompts() -> dict[str, list[str]]:
    """Of each specialist, the prompts of the tasks that it is trained on."""
    return {modality: [load_task(name).prompt for name in TASKS[modality]] for modality in MODALITIES}


def encodings(modalities: tuple[Modality, ...] = MODALITIES) -> dict[str, Encoding]:
    """How the specialists read each modality."""
    settings: dict[Modality, dict[str, Any]] = {modality: PLANS[modality].settings for modality in modalities}
    if "protein" in settings:
        settings["protein"] = {"kind": "text", "placeholder": "<protein>", "max_characters": _LONGEST_PROTEIN}
    return {modality: modality_from_settings(own, f"the plan of {modality}") for modality, own in settings.items()}


def write_untrained(base: Path, modalities: tuple[Modality, ...], seed: int, folder: Path, rank: int = RANK) -> None:
    """An adapter that changes nothing yet, and untrained encoders.

    Args:
        base: folder of the LLM.
        modalities: that get an encoder.
        seed: of the adapter and the encoders.
        folder: to write; it must not exist.
        rank: of the adapter.
    """
    with building(folder) as temporary, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        llm = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted: Any = get_peft_model(llm, lora)
        adapted.peft_config["default"].base_model_name_or_path = BASE_ID
        adapted.save_pretrained(temporary, save_embedding_layers=False)
        (temporary / "README.md").unlink(missing_ok=True)  # a template without content
        hidden = AutoConfig.from_pretrained(base).hidden_size
        own = encodings(modalities)
        encoders: dict[str, Encoder] = {name: known.build(hidden) for name, known in with_encoder(own).items()}
        for name, modality in own.items():
            place = temporary / MODALITIES_FOLDER / name
            if name in encoders:
                save_encoder(modality, encoders[name], place)
            else:
                save_modality(modality, place)


def training_recipe(base: Path, modality: Modality, seed: int, untrained: Path) -> dict[str, Any]:
    """The recipe of one specialist."""
    own = {"tasks": list(TASKS[modality]), "samples": _SAMPLES[modality], "epochs": _EPOCHS[modality]}
    own |= {"batch_size": _BATCH_SIZES[modality], "repeat": _REPEAT[modality]}
    return {**_recipe(base, seed, untrained), **own, "train_encoders": True, "learning_rate": 1e-3}


def joint_recipe(base: Path, seed: int, untrained: Path) -> dict[str, Any]:
    """The recipe of one adapter that learns everything at once, in as many steps as the specialists together.

    In bfloat16, as it would take three times as long otherwise.
    """
    repeat = {task: count for own in _REPEAT.values() for task, count in own.items()}
    own = {
        "tasks": _all_tasks(),
        "repeat": repeat,
        "samples": 1600,
        "epochs": 3,
        "batch_size": 8,
        "precision": "bfloat16",
    }
    return {**_recipe(base, seed, untrained), **own, "train_encoders": True, "learning_rate": 1e-3}


def tuning_recipe(base: Path, seed: int, average: Path) -> dict[str, Any]:
    """The recipe of the average of the specialists, trained further for a short time."""
    return {**_recipe(base, seed, average), "tasks": _all_tasks(), "samples": 150, "epochs": 1, "learning_rate": 3e-4}


def _all_tasks() -> list[str]:
    return [task for own in TASKS.values() for task in own]


def _recipe(base: Path, seed: int, start: Path) -> dict[str, Any]:
    return {"model": str(start), "base": str(base), "batch_size": 16, "validation": None, "seed": seed}


def write_recipe(recipe: dict[str, Any], file: Path) -> None:
    """As YAML."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
