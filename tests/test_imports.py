"""Who may import whom."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each package, and those of ours that it may import.
PACKAGES = {
    "esmerge": set(),
    "benchmarks": {"esmerge", "lightning_modules"},
    "hub_cards": {"esmerge"},
    "lightning_modules": {"benchmarks", "esmerge"},
}
# The story, from first to last: no step imports a later one.
STORY = ["recipe", "sources", "specialists", "probe", "signals", "coefficients", "merging", "pipeline", "cli"]
# Pure functions, and what they may use beside torch: the methods declare the bounds of their parameters.
PURE = {"coefficients": set(), "methods": {"numpy", "pydantic"}}


def name_of(file):
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): file for package in PACKAGES for file in (ROOT / package).rglob("*.py")}


def is_type_checking(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def nodes(tree, inside_functions):
    """All nodes that run, those inside functions only if asked for; imports for type checkers never run."""
    for node in ast.iter_child_nodes(tree):
        if is_type_checking(node) or (isinstance(node, ast.FunctionDef) and not inside_functions):
            continue
        yield node
        yield from nodes(node, inside_functions)


def imports(module, inside_functions=True):
    """Names of the modules that a module imports, ours as modules and the others as packages."""
    found = set()
    for node in nodes(ast.parse(MODULES[module].read_text()), inside_functions):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} has a relative import"
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in submodules]
        else:
            continue
        found.update(name if name in MODULES else name.partition(".")[0] for name in names)
    return found


def ours(module, **options):
    return {name for name in imports(module, **options) if name in MODULES}


def step_of(module):
    package, _, rest = module.partition(".")
    step = rest.partition(".")[0]
    return STORY.index(step) if package == "esmerge" and step in STORY else None


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_those_below(package):
    allowed = PACKAGES[package] | {package}
    for module in MODULES:
        # The command line may import anything, inside its commands.
        if module.partition(".")[0] == package and module != "esmerge.cli":
            foreign = {name for name in ours(module) if name.partition(".")[0] not in allowed}
            assert not foreign, f"{module} imports {foreign}"


def test_command_line_imports_inside_its_commands():
    assert ours("esmerge.cli", inside_functions=False) <= {"esmerge.errors"}
    assert "torch" not in imports("esmerge.cli", inside_functions=False)


def test_benchmark_tasks_know_nothing_of_ours():
    for module in MODULES:
        if module.startswith("benchmarks.tasks."):
            foreign = imports(module) - set(sys.stdlib_module_names) - {"pydantic"}
            assert all(name.startswith("benchmarks.tasks") for name in foreign), f"{module} imports {foreign}"


def test_engine_knows_no_lightning():
    for module in MODULES:
        if module.startswith("esmerge"):
            assert not imports(module) & {"lightning", "pytorch_lightning", "torchmetrics"}, module


@pytest.mark.parametrize("room", PURE)
def test_pure_functions_import_torch_only(room):
    modules = [module for module in MODULES if f"{module}.".startswith(f"esmerge.{room}.")]
    assert modules
    for module in modules:
        used = {name for name in imports(module) if not name.startswith(f"esmerge.{room}")}
        assert used - set(sys.stdlib_module_names) <= {"torch", *PURE[room]}, module


def test_no_step_imports_a_later_one():
    for module in MODULES:
        for other in ours(module):
            steps = step_of(module), step_of(other)
            assert None in steps or steps[0] >= steps[1], f"{module} imports {other}"


def test_nothing_imports_the_end_of_the_story():
    for end, allowed in {
        "esmerge.pipeline": {"esmerge", "esmerge.cli", "esmerge.tables"},
        "esmerge.cli": set(),
    }.items():
        importers = {module for module in MODULES if module.startswith("esmerge") and end in ours(module)}
        assert importers <= allowed


def test_there_are_no_circles():
    graph = {module: ours(module) - {module} for module in MODULES}
    assert list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("statement", ["import esmerge", "import esmerge.cli", "from esmerge import InputError"])
def test_import_is_light(statement):
    heavy = "{'torch', 'transformers', 'peft'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", f"import sys; {statement}; sys.exit(bool({heavy}))"], check=True, cwd=ROOT)
