"""The command line: `esmerge merge | compare | inspect | demo`. Each command imports what it needs inside."""

import errno
import gc
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from esmerge.errors import InputError

app = typer.Typer(
    name="esmerge",
    help="Merge specialist LLMs that share a base, with coefficients from embedding signals.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

_NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the result is larger than the file system or the limit of this process allows (see ulimit -f)",
}

Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress bars.")]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Override a field of the recipe; may be repeated."),
]

TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python code that comes with the base, if there is some.")
]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    logging.basicConfig(format="esmerge: %(levelname)s: %(message)s", level=logging.WARNING)


@app.command()
def merge(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write; it must not exist.")],
    set_: Changes = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a killed merge into OUTPUT stopped.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
) -> None:
    """Merge the specialists of a RECIPE into one model.

    Writes a LoRA adapter that PEFT loads, or a full checkpoint that transformers loads; beside it `esmerge.yaml`
    (recipe, hashes and versions: enough to do it again) and `coefficients.safetensors`.

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
    from esmerge.figures import draw_figures
    from esmerge.results import read_coefficients
    from esmerge.tables import print_coefficients

    coefficients = read_coefficients(folder)
    print_coefficients(coefficients)
    for file in draw_figures(coefficients, folder / "figures"):
        print(file)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")] = Path("demo"),
) -> None:
    """Train three small biology specialists of SmolLM2 on real data, merge them, and show what that is worth.

    Takes about ten minutes on two cores the first time; the base and the specialists are then cached.
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
    except KeyboardInterrupt:
        _interrupted(debug)
    except OSError as error:
        if error.errno in _NO_ROOM:
            reason = _NO_ROOM[error.errno]
            _fail(f"{reason}; nothing was written: free some space or choose another output.", 1, debug)
        _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}.", 1, debug)
    except Exception as error:
        _fail(f"{type(error).__name__}: {error} (an error inside esmerge; --debug shows where)", 1, debug)


def _imported() -> None:
    """Let the garbage collector run, but not over the modules: much of the start and the end went there."""
    gc.freeze()
    gc.enable()


def _interrupted(debug: bool) -> NoReturn:
    print(file=sys.stderr)  # ends the line of a progress bar, or of the terminal's ^C
    _fail("interrupted; nothing was written.", 130, debug)


def _fail(message: str, code: int, debug: bool) -> NoReturn:
    if debug:
        raise
    print(f"esmerge: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
