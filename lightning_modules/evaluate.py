"""`esmerge evaluate` on one page: a model and tasks in, results/<task>.json and results/<task>.jsonl out."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from transformers.utils.logging import disable_progress_bar

from benchmarks.tasks.task import Task
from esmerge.errors import InputError
from esmerge.mllm import MllmForConditionalGeneration, MllmProcessor
from esmerge.mllm.loading import base_of, load_model, load_processor
from esmerge.sources import Source, content_hash, resolve
from lightning_modules.evaluation import Evaluation, Normalisation, ScoreKind, divisors
from lightning_modules.evaluation_data import EvaluatedTask, EvaluationData
from lightning_modules.evaluation_results import (
    RESULTS_FOLDER,
    all_versions,
    describe_model,
    describe_task,
    esmerge_recipe,
    is_own_base,
    outcomes_of,
    read_results,
    results_file,
    summary,
    write_results,
)
from lightning_modules.metrics import OF_ALL, scores_with_intervals
from lightning_modules.prompts import ChatFormat, PromptWriter, check_choices, content_digest, hash_lines
from lightning_modules.running import Devices, make_loggers, progress_callbacks, quiet_lightning
from lightning_modules.sample_log import Record, UnfinishedRun, log_file, read_log
from lightning_modules.samples import Item, Sample, load_samples
from lightning_modules.soft_tokens import ItemFeatures
from lightning_modules.tasks import check_names, load_task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationSettings:
    """How a model is evaluated.

    Attributes:
        base: of an adapter; None for the one that it names.
        limit: samples per task at most, the first of the data; None for all.
        batch_size: prompts at a time; None to find what memory allows.
        score: by the choices' likelihood, or by generated text.
        normalise: what log-likelihoods are divided by before choices are compared.
        dtype: of the weights; `auto` for that of the files.
        chat_template: a file, or `none`; None for the tokenizer's own.
        as_text: modalities whose items are written as text.
        resume: whether to go on with an interrupted evaluation, and to keep finished ones.
        seed: of the bootstrap.
        loggers: names of Lightning's loggers.
        progress: whether to show progress bars.
        trust_remote_code: whether code that comes with the model may run.
    """

    base: str | None = None
    limit: int | None = None
    batch_size: int | None = None
    score: ScoreKind = "likelihood"
    normalise: Normalisation = "none"
    dtype: str = "auto"
    chat_template: str | None = None
    as_text: tuple[str, ...] = ()
    devices: Devices = field(default_factory=Devices)
    resume: bool = False
    seed: int = 42
    loggers: tuple[str, ...] = ()
    progress: bool = True
    trust_remote_code: bool = False


def evaluate(
    model: str, tasks: Sequence[str], settings: EvaluationSettings, output: Path | None = None
) -> dict[str, dict[str, Any]]:
    """Evaluate a model on tasks and write the results.

    Args:
        model: whatever `esmerge.load_model` takes.
        tasks: names, or paths of YAML files.
        settings: how.
        output: the folder in which `results` is written; None for the model's own.

    Returns:
        The results by task, as they are written; nothing in processes other than the first.

    Raises:
        InputError: for anything that the user can put right; before the model is loaded, as far as can be.
    """
    # Whoever pushes to the Hub meanwhile changes nothing: all is taken from the commits that are found here.
    source = resolve(model, Path(), "the model", settings.trust_remote_code)
    named = base_of(source.folder, settings.base)
    base = None if named is None else resolve(named, Path(), "the base (--base)", settings.trust_remote_code)
    pinned = (source.pinned, None if base is None else base.pinned)
    folder = _output_folder(source, output)
    loaded = [load_task(name) for name in tasks]
    check_names(loaded, "--task")
    processor = load_processor(*pinned, settings.trust_remote_code)
    writer = PromptWriter(processor, ChatFormat.of(processor, settings.chat_template), settings.as_text)
    writer.check_as_text(loaded, "--as-text")
    prepared = [_prepare(task, processor, writer, settings, folder) for task in loaded]
    settings.devices.check(min(len(task.samples) for task in prepared))
    first = rank_zero_only.rank == 0
    identity = describe_model(source, base) if first or settings.resume else {}
    if first and base is not None and not is_own_base(source.folder, identity["base"]):
        logger.warning(
            "%s was merged on another base than %s: these are no scores of what was merged.", model, base.reference
        )
    runs = {task.task.name: _run_of(task, writer, settings, identity) for task in prepared}

    results = {task.task.name: _finished(task, runs, settings, folder) for task in prepared}
    pending = [task for task in prepared if results[task.task.name] is None]
    if pending:
        trainer = _trainer(pending, settings, folder)
        with ExitStack() as logs:
            for task in pending:
                logs.enter_context(task.log)
                if first:
                    task.log.begin(runs[task.task.name], settings.resume)
            module = _answer(pending, partial(_load, *pinned, settings), settings, trainer)
            if not trainer.is_global_zero:
                return {}
            for task in pending:
                records = task.log.finish(folder / RESULTS_FOLDER, [sample.id for sample in task.samples])
                found = {
                    "model": identity,
                    **_judge(task, records, settings),
                    "items": _forms(task.samples, writer),
                    "run": runs[task.task.name],
                    "log": content_hash(log_file(folder / RESULTS_FOLDER, task.task.name)),
                    "settings": _described(settings, module, task),
                    "esmerge": esmerge_recipe(source.folder),
                    "versions": all_versions(),
                    **module.speed(task),
                }
                write_results(results_file(folder, task.task.name), found)
                _log(module, task.task.name, found["scores"])
                task.log.remove()
                results[task.task.name] = found
    return {name: found for name, found in results.items() if found is not None}


def _output_folder(source: Source, output: Path | None) -> Path:
    if output is None and source.commit is not None:
        raise InputError(f"{source.reference} is a model of the Hub: give the folder for its results with --output.")
    folder = source.folder if output is None else output
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output: {folder} is a file; give a folder.")
    return folder


def _prepare(
    task: Task, processor: MllmProcessor, writer: PromptWriter, settings: EvaluationSettings, folder: Path
) -> EvaluatedTask:
    samples = load_samples(task, limit=settings.limit)
    writer.check_modalities(task.name, samples)
    by_likelihood = settings.score == "likelihood"
    tokenizer = processor.tokenizer
    asked = writer.write(samples[0], task.answer_prefix)
    choices = writer.tokenize_answers(task.choices, task.answer_prefix, asked.text)
    check_choices(task.choices, choices, compare_sums=by_likelihood and settings.normalise == "none")
    prompts = [writer.write(sample, task.answer_prefix if by_likelihood else "") for sample in samples]
    return EvaluatedTask(
        task=task,
        samples=samples,
        prompt_ids=writer.tokenize(prompts),
        items=[prompt.items for prompt in prompts],
        features=ItemFeatures(processor),
        choice_ids=choices,
        tokenizer=tokenizer,
        log=UnfinishedRun(folder / RESULTS_FOLDER, task.name),
    )


def _run_of(
    task: EvaluatedTask, writer: PromptWriter, settings: EvaluationSettings, identity: dict[str, Any]
) -> dict[str, Any]:
    """All that determines the records of an evaluation."""
    asked, base = task.task, identity.get("base", {})
    read = [asked.answer_prefix, list(asked.spellings.items()), asked.max_new_tokens]
    return {
        "model": identity.get("hash"),
        "base": base.get("hash"),
        "code": [identity.get("code"), base.get("code")] if settings.trust_remote_code else None,
        "task": asked.name,
        "version": asked.version,
        "samples": hash_lines(task.samples, lambda sample: [sample.id, sample.answer, sample.group]),
        "prompts": hash_lines(list(zip(task.prompt_ids, task.items, strict=True)), list),
        "features": task.features.digest(),
        "choices": content_digest([list(asked.choices), task.choice_ids]),
        "reading": content_digest(read) if settings.score == "generate" else None,
        "chat_template": writer.chat.hash,
        "score": settings.score,
        "normalise": settings.normalise if settings.score == "likelihood" else None,
        "dtype": settings.dtype,
        "batch_size": settings.batch_size or "auto",
    }


def _finished(
    task: EvaluatedTask, runs: dict[str, dict[str, Any]], settings: EvaluationSettings, folder: Path
) -> dict[str, Any] | None:
    """Results of the same evaluation that are there already, judged anew where other metrics or seeds are asked for."""
    file, log = results_file(folder, task.task.name), log_file(folder / RESULTS_FOLDER, task.task.name)
    if not settings.resume or not file.exists() or not log.exists():
        return None
    found = read_results(file)
    if found["run"] != runs[task.task.name] or found.get("log") != content_hash(log):
        return None
    if found["task"] == describe_task(task.task) and found["settings"]["seed"] == settings.seed:
        return found
    found |= _judge(task, read_log(log), settings)
    found["settings"]["seed"] = settings.seed
    if rank_zero_only.rank == 0:
        write_results(file, found)
    return found


def _load(model: str, base: str | None, settings: EvaluationSettings) -> MllmForConditionalGeneration:
    dtype = settings.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    return load_model(model, base, dtype, trust_remote_code=settings.trust_remote_code)[0]


def _trainer(tasks: Sequence[EvaluatedTask], settings: EvaluationSettings, folder: Path) -> Trainer:
    with quiet_lightning():
        return settings.devices.trainer(
            logger=make_loggers(settings.loggers, folder / RESULTS_FOLDER) or False,
            callbacks=progress_callbacks([task.task.name for task in tasks], settings.progress),
            enable_progress_bar=settings.progress,
            enable_checkpointing=False,
        )


def _answer(
    tasks: Sequence[EvaluatedTask],
    load: Callable[[], MllmForConditionalGeneration],
    settings: EvaluationSettings,
    trainer: Trainer,
) -> Evaluation:
    """Fill the tasks' logs, on all devices."""
    if not settings.progress or rank_zero_only.rank != 0:
        disable_progress_bar()  # of the weights' loading
    module = Evaluation(load, tasks, settings.score, settings.normalise, settings.devices.sharded)
    data = EvaluationData(tasks, settings.batch_size, module.find_batch_size)
    with quiet_lightning():
        trainer.test(module, datamodule=data, verbose=False)
    return module


def _judge(task: EvaluatedTask, records: Sequence[Record], settings: EvaluationSettings) -> dict[str, Any]:
    """What the records say about the model."""
    generated = settings.score == "generate"
    lengths = None if generated else divisors(task.task, task.choice_ids, settings.normalise).tolist()
    outcomes = outcomes_of(records, task.task.choices, lengths)
    extra = OF_ALL if generated else ()
    wanted = list(dict.fromkeys((*task.task.metrics, *extra)))
    scores = scores_with_intervals(outcomes, wanted, settings.seed)
    return {"task": describe_task(task.task), **summary(records, task.task.choices, scores)}


def _log(module: Evaluation, task: str, scores: Mapping[str, Mapping[str, float | None]]) -> None:
    for logger in module.loggers:
        # Some loggers take numbers only, and a metric can be undefined.
        values = {f"{task}/{name}": score["value"] for name, score in scores.items() if score["value"] is not None}
        logger.log_metrics(values)
        logger.save()


def _forms(samples: Sequence[Sample], writer: PromptWriter) -> dict[str, str]:
    """How the model got the items of each modality."""
    parts = (part for sample in samples for turn in sample.turns for part in turn.parts)
    used = sorted({part.modality for part in parts if isinstance(part, Item)})
    return {name: "encoder" if name in writer.encoded else "text" for name in used}


def _described(settings: EvaluationSettings, module: Evaluation, task: EvaluatedTask) -> dict[str, Any]:
    # The module itself is back on the CPU by now.
    ran_on = module.trainer.strategy.root_device.type
    return {
        "score": settings.score,
        "normalise": settings.normalise,
        "choice_lengths": divisors(task.task, task.choice_ids, settings.normalise).tolist(),
        "limit": settings.limit,
        "seed": settings.seed,
        "resampled": task.task.group or "samples",
        "dtype": str(module.dtype_of_weights).removeprefix("torch."),
        "batch_size": settings.batch_size or task.log.note("batch_size"),
        "devices": settings.devices.count,
        **({"threads": torch.get_num_threads()} if ran_on == "cpu" else {}),
        "strategy": settings.devices.strategy,
        "accelerator": ran_on,
    }
