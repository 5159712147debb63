"""Trains the three specialists: a LoRA adapter of the base for each modality's task."""

import hashlib
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from pytorch_lightning import Trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.testbed.base_model import base_model_folder
from benchmarks.testbed.cache import building, cache_folder
from benchmarks.testbed.data import Modality, load_task
from benchmarks.testbed.packages import PINS_FILE
from benchmarks.testbed.tokenization import encode_answer, encode_prompt
from lightning_modules.data import TokenizedExample, answer_loader
from lightning_modules.finetuning import AnswerFinetuning

# Raise it when a change to the data or the training code changes what comes out: cached specialists are then retrained.
TRAINING_VERSION = 1


@dataclass(frozen=True)
class TrainingPlan:
    """Everything about one training run that is not data."""

    examples: int
    epochs: int
    learning_rate: float
    batch_size: int = 8
    warmup_share: float = 0.1
    rank: int = 8
    alpha: int = 16
    seed: int = 42


# Sized for five minutes in all on two idle CPU cores. So few examples call for many small steps: the protein
# specialist's validation AUROC is 0.68 after batches of 16 at 1e-3, and 0.83 after batches of 8 at 2e-3 (of 1,500).
PLANS: dict[Modality, TrainingPlan] = {
    "molecule": TrainingPlan(examples=700, epochs=1, learning_rate=2e-3),
    "protein": TrainingPlan(examples=600, epochs=1, learning_rate=2e-3),
    "cell": TrainingPlan(examples=240, epochs=2, learning_rate=2e-3),
}


def specialist_folder(modality: Modality) -> Path:
    """The PEFT adapter folder of one specialist; trained on the first call, then cached."""
    plan = PLANS[modality]
    folder = cache_folder() / "specialists" / f"{modality}-{fingerprint(plan)}"
    if not folder.is_dir():
        with building(folder) as temporary:
            train(modality, plan, temporary)
    return folder


def train(modality: Modality, plan: TrainingPlan, output: Path) -> None:
    """Trains one specialist as planned and saves its adapter in `output`."""
    base = base_model_folder()
    task = load_task(modality)
    tokenizer = AutoTokenizer.from_pretrained(base)
    examples = [
        TokenizedExample(
            encode_prompt(tokenizer, task.prompt(example)),
            [*encode_answer(tokenizer, example.answer), tokenizer.eos_token_id],
        )
        for example in task.examples["train"][: plan.examples]
    ]
    # For rows this short, plain attention takes two thirds of the time that the fused kernel takes on a CPU.
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, attn_implementation="eager")
    lora = LoraConfig(r=plan.rank, lora_alpha=plan.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        # PEFT keeps the adapters in float32 on the bfloat16 base: small updates would be lost otherwise.
        specialist = get_peft_model(model, lora).train()
    with _quiet_lightning():
        trainer = Trainer(
            accelerator="cpu",
            precision="bf16-mixed",
            max_epochs=plan.epochs,
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        trainer.fit(
            AnswerFinetuning(specialist, learning_rate=plan.learning_rate, warmup_share=plan.warmup_share),
            answer_loader(examples, plan.batch_size, plan.seed),
        )
    specialist.save_pretrained(output)


def fingerprint(plan: TrainingPlan) -> str:
    """Changes with everything that determines the trained weights."""
    determinants = {"plan": asdict(plan), "packages": PINS_FILE.read_text(), "version": TRAINING_VERSION}
    return hashlib.sha256(json.dumps(determinants, sort_keys=True).encode()).hexdigest()[:12]


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Keeps the progress bar, drops the notes about hardware, loaders and products."""
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="pytorch_lightning")
            yield
    finally:
        logger.setLevel(level)
