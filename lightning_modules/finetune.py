"""`esmerge finetune` on one page: a recipe in, an adapter (or a full model) that load_model and merge take out."""

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, Timer
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from transformers.utils.logging import disable_progress_bar

from benchmarks.tasks.task import Task
from esmerge.errors import InputError
from esmerge.mllm import MllmForConditionalGeneration, MllmProcessor
from esmerge.mllm.loading import base_of, load_model, load_processor
from esmerge.modalities import Encoder
from esmerge.modalities.registry import MODALITIES_FOLDER, save_encoder, save_modality
from esmerge.results import check_output
from esmerge.sources import Source, is_on_hub, resolve
from esmerge.tokenizer import NO_TEMPLATE
from esmerge.yaml_files import nearest
from lightning_modules.data import TokenizedExample
from lightning_modules.evaluation_results import all_versions, describe_model, portable
from lightning_modules.finetune_recipe import FinetuningRecipe
from lightning_modules.finetuning import VALIDATION_LOSS, AnswerFinetuning, JudgedFinetuning, StopEarly
from lightning_modules.finetuning_data import FinetuningData
from lightning_modules.prompts import ChatFormat, PromptWriter, content_digest
from lightning_modules.running import Devices, WholeCheckpoints, make_loggers, quiet_lightning
from lightning_modules.samples import Sample, load_samples
from lightning_modules.tasks import check_names, load_task
from lightning_modules.unfinished import UnfinishedFolder, damaged

RECORD = "finetuning.yaml"
_CHECKPOINTS = "checkpoints"
_LOGS = "logs"


def finetune(
    recipe: FinetuningRecipe,
    output: Path,
    devices: Devices,
    resume: bool = False,
    progress: bool = True,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Train as a recipe says and write the result, checkpoints being kept beside it until then.

    Args:
        recipe: what to train on what.
        output: the folder to write; it must not exist.
        devices: on what.
        resume: whether to go on from the last checkpoint of an interrupted training; the result is the same to the
            last bit as without the interruption.
        progress: whether to show progress bars.
        trust_remote_code: whether code that comes with the model may run.

    Returns:
        The record of the training, as it is written; nothing in processes other than the first.

    Raises:
        InputError: for anything that the user can put right; before the model is loaded, as far as can be.
    """
    if devices.sharded:
        raise InputError("--strategy fsdp is for evaluation; an adapter is trained with ddp.")
    check_output(output)
    source = resolve(recipe.model, recipe.folder, "model", trust_remote_code)
    base = _base_of(recipe, source, trust_remote_code)
    processor = load_processor(source.folder, _reference(base), trust_remote_code)
    tasks = [load_task(_task_reference(name, recipe.folder)) for name in recipe.tasks]
    check_names(tasks, "tasks")
    template = recipe.chat_template
    if template not in (None, NO_TEMPLATE):
        template = str(recipe.folder / template)
    writer = PromptWriter(processor, ChatFormat.of(processor, template), recipe.as_text)
    writer.check_as_text(tasks, "as_text")
    _check_repeat(recipe, tasks)
    training = {
        task.name: _examples(task, None, recipe.samples, processor, writer) * recipe.repeat.get(task.name, 1)
        for task in tasks
    }
    judged = recipe.validation
    validation = {
        task.name: _examples(task, judged.split, judged.samples, processor, writer) for task in tasks if judged
    }
    data = FinetuningData(
        _mixed(training),
        _mixed(validation),
        processor,
        recipe.batch_size,
        recipe.epochs,
        judged.per_epoch if judged else 1,
        recipe.seed,
        devices.count,
    )
    devices.check(min(len(examples) for examples in (data.training, data.validation) if examples))
    work = UnfinishedFolder(output.parent / f".{output.name}.finetuning", f"the training of {output}")
    trainer = _trainer(recipe, data, devices, work.folder, progress)
    identity = describe_model(source, base) if rank_zero_only.rank == 0 else {}
    with work:
        if rank_zero_only.rank == 0:
            work.begin(_run_of(recipe, data, identity, devices), resume)
        interrupted = work.folder if resume else None
        module, processor = _fit(recipe, source, base, data, devices, trainer, interrupted, trust_remote_code)
        if not trainer.is_global_zero:
            return {}
        loss = _take_best(module, trainer)
        _check_finite(module, loss)
        record = {
            "recipe": portable(
                recipe.model_dump(mode="json", exclude_none=True), partial(is_on_hub, relative_to=recipe.folder)
            ),
            "model": identity,
            "samples": {name: len(examples) for name, examples in training.items()},
            "steps": trainer.global_step,
            "devices": devices.count,
            **({} if loss is None else {VALIDATION_LOSS: loss}),
            "versions": all_versions(),
            "seconds": round(_seconds(trainer), 1),
        }
        result = work.folder / "result"
        # What is left of one that could not be written to its end.
        shutil.rmtree(result, ignore_errors=True)
        _save(module.model, processor, source, base, result)
        (result / RECORD).write_text(yaml.safe_dump(record, sort_keys=False, allow_unicode=True), encoding="utf-8")
        if (work.folder / _LOGS).exists():
            shutil.move(work.folder / _LOGS, result / _LOGS)
        result.rename(output)
        work.remove()
    return record


def _seconds(trainer: Trainer) -> float:
    """How long was trained, without what an interruption undid."""
    return next(own for own in trainer.callbacks if isinstance(own, Timer)).time_elapsed()


def _base_of(recipe: FinetuningRecipe, source: Source, trust_remote_code: bool) -> Source | None:
    """The base of an adapter, a folder being relative to the recipe if it is named there; None of a whole model."""
    named = base_of(source.folder, recipe.base)
    if named is None:
        if recipe.base is not None:
            raise InputError(
                f"base: {source.folder} holds no adapter but a whole model, which needs no base: leave it out."
            )
        return None
    return resolve(named, Path() if recipe.base is None else recipe.folder, "base", trust_remote_code)


def _reference(source: Source | None) -> str | None:
    return None if source is None else source.pinned


def _check_repeat(recipe: FinetuningRecipe, tasks: Sequence[Task]) -> None:
    names = [task.name for task in tasks]
    for name in recipe.repeat:
        if name not in names:
            raise InputError(
                f"repeat.{name} is none of the tasks{nearest(name, names)} (they are: {', '.join(names)})."
            )


def _task_reference(name: str, folder: Path) -> str:
    return str(folder / name) if name.endswith((".yaml", ".yml")) else name


def _examples(
    task: Task, split: str | None, limit: int | None, processor: MllmProcessor, writer: PromptWriter
) -> list[TokenizedExample]:
    samples: list[Sample] = load_samples(task, split or task.split.training, limit)
    writer.check_modalities(task.name, samples)
    tokenizer = processor.tokenizer
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"the tokenizer of {tokenizer.name_or_path} has no token that ends an answer: set eos_token in its "
            "tokenizer_config.json."
        )
    prompts = [writer.write(sample, task.answer_prefix) for sample in samples]
    ids = writer.tokenize(prompts)
    answers = [
        [*answer, tokenizer.eos_token_id]
        for answer in writer.tokenize_answers(task.choices, task.answer_prefix, prompts[0].text)
    ]
    return [
        TokenizedExample(prompt_ids, answers[sample.answer], prompt.items)
        for prompt_ids, sample, prompt in zip(ids, samples, prompts, strict=True)
    ]


def _mixed(examples: dict[str, list[TokenizedExample]]) -> list[TokenizedExample]:
    return [example for own in examples.values() for example in own]


def _run_of(
    recipe: FinetuningRecipe, data: FinetuningData, identity: dict[str, Any], devices: Devices
) -> dict[str, Any]:
    """All that determines the result."""
    examples = [[e.prompt_ids, e.answer_ids, e.items] for e in (*data.training, *data.validation)]
    return {
        "recipe": recipe.model_dump(mode="json"),
        "model": identity,
        "examples": content_digest(examples),
        "devices": devices.count,
    }


def _in_bfloat16(recipe: FinetuningRecipe, devices: Devices) -> bool:
    return recipe.precision == "bfloat16" or (recipe.precision == "auto" and not devices.on_cpu)


def _trainer(recipe: FinetuningRecipe, data: FinetuningData, devices: Devices, folder: Path, progress: bool) -> Trainer:
    options: dict[str, Any] = {"dirpath": folder / _CHECKPOINTS, "save_on_train_epoch_end": True}
    options["enable_version_counter"] = False
    # A timer's state is part of checkpoints, so a training that goes on later counts from its beginning.
    callbacks: list[Callback] = [Timer()]
    if recipe.validation is not None:
        callbacks.append(ModelCheckpoint(filename="best", monitor=VALIDATION_LOSS, save_weights_only=True, **options))
        if recipe.validation.patience is not None:
            callbacks.append(StopEarly(VALIDATION_LOSS, patience=recipe.validation.patience))
    # To go on from after every round; after the best, as it holds which that is.
    callbacks.append(ModelCheckpoint(filename="last", **options))
    with quiet_lightning():
        return devices.trainer(
            unused_parameters=recipe.train_encoders,
            precision="bf16-mixed" if _in_bfloat16(recipe, devices) else "32-true",
            logger=make_loggers(["csv"], folder / _LOGS),
            callbacks=callbacks,
            plugins=[WholeCheckpoints()],
            enable_progress_bar=progress,
            max_epochs=data.rounds,
            reload_dataloaders_every_n_epochs=1,
            num_sanity_val_steps=0,
            gradient_clip_val=recipe.gradient_clip,
            log_every_n_steps=min(50, data.steps_per_round),
        )


def _load(
    recipe: FinetuningRecipe, source: Source, base: Source | None, devices: Devices, trust_remote_code: bool
) -> tuple[MllmForConditionalGeneration, MllmProcessor]:
    """The model with what is trained in float32 and set to be trained, and all else not."""
    dtype = torch.bfloat16 if _in_bfloat16(recipe, devices) else torch.float32
    model, processor = load_model(source.folder, _reference(base), dtype, trust_remote_code=trust_remote_code)
    model.requires_grad_(False)
    if isinstance(model.language_model, PeftModel):
        model.language_model.set_adapter(model.language_model.active_adapter)
        for module in model.language_model.modules():
            if isinstance(module, BaseTunerLayer):
                module.train()
                module.get_base_layer().eval()
    else:
        lora = recipe.lora
        targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
        torch.manual_seed(recipe.seed)
        try:
            model.language_model = get_peft_model(
                model.language_model,
                LoraConfig(
                    task_type="CAUSAL_LM",
                    r=lora.rank,
                    lora_alpha=lora.alpha,
                    lora_dropout=lora.dropout,
                    target_modules=targets,
                ),
            )
        except ValueError as error:
            raise InputError(f"lora.targets: {error}") from error
    if recipe.train_encoders:
        model.encoders.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            # Small updates would be lost in less.
            parameter.data = parameter.data.float()
    return model, processor


def _fit(
    recipe: FinetuningRecipe,
    source: Source,
    base: Source | None,
    data: FinetuningData,
    devices: Devices,
    trainer: Trainer,
    interrupted: Path | None,
    trust_remote_code: bool,
) -> tuple[JudgedFinetuning, MllmProcessor]:
    """Train, from the last checkpoint of an interrupted training if there is one."""
    if not trainer.progress_bar_callback or rank_zero_only.rank != 0:
        disable_progress_bar()  # of the weights' loading
    model, processor = _load(recipe, source, base, devices, trust_remote_code)
    options = ("learning_rate", "encoder_learning_rate", "warmup_share", "weight_decay")
    module = JudgedFinetuning(model, recipe.seed, data.steps, **{option: getattr(recipe, option) for option in options})
    last = None if interrupted is None else interrupted / _CHECKPOINTS / "last.ckpt"
    last = last if last is not None and last.exists() else None
    if last is not None:
        _check_readable(last)
    with quiet_lightning():
        trainer.fit(module, datamodule=data, ckpt_path=last, weights_only=True)
    return module, processor


def _check_readable(checkpoint: Path) -> None:
    """Raise `InputError` for a checkpoint that cannot be gone on from."""
    try:
        torch.load(checkpoint, map_location="meta", weights_only=True)
    except (RuntimeError, OSError, EOFError, UnpicklingError) as error:
        raise damaged(checkpoint) from error


def _take_best(module: AnswerFinetuning, trainer: Trainer) -> float | None:
    """Give the model the weights of the lowest validation loss, and return that loss."""
    best = next((c for c in trainer.checkpoint_callbacks if getattr(c, "monitor", None) == VALIDATION_LOSS), None)
    if not isinstance(best, ModelCheckpoint) or best.best_model_score is None:
        return None
    checkpoint = torch.load(best.best_model_path, map_location="cpu", weights_only=True)
    module.load_state_dict(checkpoint["state_dict"], strict=False)
    return float(best.best_model_score)


def _check_finite(module: AnswerFinetuning, loss: float | None) -> None:
    """Raise `InputError` for a training whose result is of no use."""
    numbers = {"the validation loss": torch.tensor(loss or 0.0)}
    numbers |= {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if bad := next((name for name, values in numbers.items() if not values.isfinite().all()), None):
        raise InputError(f"the training diverged ({bad} is not finite), so nothing is written: lower learning_rate.")


def _save(
    model: MllmForConditionalGeneration, processor: MllmProcessor, source: Source, base: Source | None, folder: Path
) -> None:
    """An adapter where there was one or a plain LLM; a multimodal checkpoint gets the adapter merged into it."""
    folder.mkdir()
    model.cpu().eval()
    adapted: Any = model.language_model
    if base is None and model.config.model_type == _stored_type(source):
        model.language_model = adapted.merge_and_unload()
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return
    put_on = base or source
    for config in adapted.peft_config.values():
        # Like this it is found from anywhere, at the very revision that was trained on.
        on_hub = put_on.commit is not None
        config.base_model_name_or_path = put_on.reference if on_hub else put_on.pinned
        config.revision = put_on.commit
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # a template without content
    processor.tokenizer.save_pretrained(folder)
    for name, modality in processor.modalities.items():
        place = folder / MODALITIES_FOLDER / name
        encoder = dict(model.encoders.items()).get(name)
        if isinstance(encoder, Encoder):
            save_encoder(modality, encoder, place)
        else:
            save_modality(modality, place)


def _stored_type(source: Source) -> str | None:
    return source.config().get("model_type") if (source.folder / "config.json").exists() else None
