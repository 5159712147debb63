"""Trains the three specialists: a LoRA adapter of the base for each modality's task, and the modality's encoder.

    python -m benchmarks.testbed.train [--modality molecule|protein|cell] [--seed N] [--output FOLDER]

The same seed and versions give the same bits, whatever the number of cores.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from pytorch_lightning import Trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.testbed.base_model import base_model_folder
from benchmarks.testbed.cache import building
from benchmarks.testbed.data import MODALITIES, Example, Task, load_task
from benchmarks.testbed.packages import pinned_packages
from benchmarks.testbed.prompts import encode_answer, encode_prompt
from benchmarks.testbed.specialists import BASE_ID, FOLDER, PLANS, RECORD, TrainingPlan, encoding
from esmerge.errors import InputError
from esmerge.mllm import MllmProcessor
from esmerge.mllm.loading import assemble
from esmerge.modalities.modality import with_encoder
from esmerge.modalities.registry import MODALITIES_FOLDER, save_encoder, save_modality
from esmerge.writing import single_threaded_operators
from lightning_modules.data import TokenizedExample, answer_loader, collate_answers
from lightning_modules.finetuning import AnswerFinetuning, answer_loss
from lightning_modules.running import quiet_lightning
from lightning_modules.soft_tokens import ItemFeatures

_VALIDATION_BATCH = 32


def train(base: Path, task: Task, plan: TrainingPlan, output: Path) -> None:
    """Train one specialist as planned and save it in the folder `output`, in bfloat16.

    Args:
        base: folder of the LLM.
        task: what it learns; its training examples are all used.
        plan: how.
        output: an existing folder; gets a PEFT adapter, the encoder in `modalities`, and a record of the training.
    """
    started = time.perf_counter()
    processor = MllmProcessor(AutoTokenizer.from_pretrained(base), encoding(task.modality, plan))
    # Without matrix units for bfloat16, float32 is what a CPU multiplies fastest.
    llm = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    lora = LoraConfig(r=plan.rank, lora_alpha=plan.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    # A sum split over threads depends on their number.
    with single_threaded_operators(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        adapted = get_peft_model(llm, lora)
        hidden = llm.config.hidden_size
        encoders = {name: modality.build(hidden) for name, modality in with_encoder(processor.modalities).items()}
        model = assemble(adapted, processor, encoders).train()
        module = AnswerFinetuning(model, plan.learning_rate, plan.encoder_learning_rate, plan.warmup_share)
        examples = _tokenized(processor, task, task.examples["train"])
        with quiet_lightning():
            trainer = Trainer(
                accelerator="cpu",
                max_epochs=plan.epochs,
                gradient_clip_val=1.0,
                logger=False,
                enable_checkpointing=False,
                enable_model_summary=False,
            )
            trainer.fit(module, answer_loader(examples, plan.batch_size, plan.seed, processor))
        losses = {"train": float(trainer.callback_metrics["train_loss"])}
        validation = _tokenized(processor, task, task.examples["validation"])
        losses["validation"] = _validation_loss(module, validation, ItemFeatures(processor))
    _save(adapted.to(torch.bfloat16), output)
    for name, modality in processor.modalities.items():
        folder = output / MODALITIES_FOLDER / name
        if name in encoders:
            save_encoder(modality, encoders[name].to(torch.bfloat16), folder)
        else:
            save_modality(modality, folder)
    record = {
        "base": BASE_ID,
        "task": task.name,
        "plan": asdict(plan),
        "samples": {split: len(found) for split, found in task.examples.items()},
        "packages": {name: package.version for name, package in pinned_packages().items()},
        "losses": losses,
        "seconds": round(time.perf_counter() - started),
    }
    (output / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _tokenized(processor: MllmProcessor, task: Task, examples: Sequence[Example]) -> list[TokenizedExample]:
    end = processor.tokenizer.eos_token_id
    tokenized = []
    for example in examples:
        ids, items = encode_prompt(processor, task, example)
        tokenized.append(TokenizedExample(ids, [*encode_answer(processor.tokenizer, example.answer), end], items))
    return tokenized


@torch.no_grad()
def _validation_loss(module: AnswerFinetuning, examples: Sequence[TokenizedExample], features: ItemFeatures) -> float:
    """The mean over batches."""
    module.eval()
    batches = [examples[start : start + _VALIDATION_BATCH] for start in range(0, len(examples), _VALIDATION_BATCH)]
    losses = [float(answer_loss(module.model, collate_answers(batch, features))) for batch in batches]
    return sum(losses) / max(1, len(losses))


def _save(adapted: Any, output: Path) -> None:
    """The adapter, with the id under which everyone finds its base."""
    for config in adapted.peft_config.values():
        config.base_model_name_or_path = BASE_ID
    # That embeddings are not trained is known; PEFT would ask the Hub.
    adapted.save_pretrained(output, save_embedding_layers=False)
    (output / "README.md").unlink(missing_ok=True)  # a template without content
    file = output / "adapter_config.json"
    saved = json.loads(file.read_text(encoding="utf-8"))
    # PEFT writes a set, in another order each time.
    saved["target_modules"].sort()
    file.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modality", nargs="+", choices=MODALITIES, default=list(MODALITIES))
    parser.add_argument("--output", type=Path, default=FOLDER)
    parser.add_argument("--seed", type=int, help="in place of the plan's")
    options = parser.parse_args()
    for modality in options.modality:
        folder = options.output / modality
        if folder.exists():
            raise InputError(f"{folder} exists: remove it, or choose another --output.")
        plan = PLANS[modality]
        if options.seed is not None:
            plan = replace(plan, seed=options.seed)
        with building(folder) as temporary:
            train(base_model_folder(), load_task(modality), plan, temporary)
        print(folder)


if __name__ == "__main__":
    main()
