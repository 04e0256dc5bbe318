"""The house keeps its shape: floors, no circles, no name that hides a library."""

import ast
import functools
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.hostile import project_trees

# a file imports only from floors below its own; files of one package may import each other
ROOMS = [
    "engine",
    "distributed",
    "storage",
    "text model visualize",
    "data training_utils generation",
    "training",
    "planning",
    "config_run exchange",  # config_run is read by planning.settings_file alone, when it is called
    "environment insight",
    "train",
    "main scripts benchmarks",
]
FLOORS = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms.split()}
PROGRAMS = ("main", "scripts", "benchmarks")


@functools.cache
def sources() -> dict[str, ast.Module]:
    """Every module of the project but its tests, by dotted name."""
    return {
        path.removesuffix(".py").replace("/", ".").removesuffix(".__init__"): tree
        for path, tree in project_trees().items()
    }


@functools.cache
def nodes() -> list[tuple[str, ast.AST]]:
    """Everything in every module, with the module's name."""
    return [(name, node) for name, tree in sources().items() for node in ast.walk(tree)]


def imports(tree: ast.Module) -> set[str]:
    """The dotted names that a module imports, in functions too, but not under TYPE_CHECKING."""
    found = set()
    for node in _outside_type_checking(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif (  # importlib.import_module("name")
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", "") == "import_module"
            and isinstance(node.args[0], ast.Constant)
        ):
            found.add(node.args[0].value)
    return found


def _outside_type_checking(node: ast.AST):
    yield node
    if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
        return
    for child in ast.iter_child_nodes(node):
        yield from _outside_type_checking(child)


def upward_imports(modules: dict[str, ast.Module]) -> list[str]:
    faults = []
    for name, tree in modules.items():
        room = name.split(".")[0]
        for imported in imports(tree):
            other = imported.split(".")[0]
            if other not in FLOORS or other == room:
                continue
            if other == "config_run" and name == "planning.settings_file":
                continue
            if FLOORS[other] >= FLOORS[room] or other == "config_run":
                faults.append(f"{name} imports {imported}")
    return faults


def circle(modules: dict[str, ast.Module]) -> list[str]:
    """The modules that import each other in a circle, and those that lead to them."""
    edges = {name: imports(tree) & modules.keys() for name, tree in modules.items()}
    while free := [name for name, targets in edges.items() if not targets & edges.keys()]:
        for name in free:
            del edges[name]
    return sorted(edges)


def test_no_room_imports_from_its_own_floor_or_above():
    assert upward_imports(sources()) == []
    for name, code in (
        ("model", "import train"),
        ("engine.loss", "def f():\n    from text.tokenizer import Tokenizer"),
        ("training.learner", "from environment import RuntimeEnv"),
        ("main", "import config_run"),
        ("train", "import importlib\nimportlib.import_module('config_run')"),
    ):
        assert upward_imports({name: ast.parse(code)}) != []
    code = "if TYPE_CHECKING:\n    from environment import RuntimeEnv"
    assert upward_imports({"training": ast.parse(code)}) == []


def test_no_modules_import_each_other_in_a_circle():
    assert circle(sources()) == []
    codes = {"engine.a": "import engine.b", "engine.b": "import engine.a", "model": "import engine"}
    modules = {name: ast.parse(code) for name, code in codes.items()}
    assert circle(modules) == ["engine.a", "engine.b"]


# who may: the devices' own home, choosing one, CUDA graphs, and the choice of a process group
SPEAKS_OF_GPUS = ("engine.devices", "planning.machine", "engine.compiling", "distributed.parallel")


def test_calls_that_differ_between_gpus_have_one_home():
    """torch.cuda's functions want a device with an index, others have no such function at all."""
    strays = [
        f"{name} line {node.lineno}: torch.{node.attr}"
        for name, node in nodes()
        if name not in SPEAKS_OF_GPUS and not name.startswith("benchmarks")
        if getattr(node, "attr", "") in ("cuda", "mps", "xpu", "accelerator")
        if getattr(node.value, "id", "") == "torch"
    ]
    assert strays == []


def test_no_room_hides_a_standard_or_installed_module():
    installed = {
        Path(file.parts[0]).stem
        for package in importlib.metadata.distributions()
        for file in package.files or []
        if file.parts[0] not in ("..", "tests", "test", "benchmarks", "scripts")
        and (len(file.parts) > 1 or file.suffix == ".py")
    }
    assert set(FLOORS) & (set(sys.stdlib_module_names) | installed) == set()


def test_every_python_file_is_in_a_known_room():
    rooms = {path.relative_to(REPOSITORY).parts[0] for path in REPOSITORY.glob("*/*.py")}
    rooms |= {path.stem for path in REPOSITORY.glob("*.py")}
    assert rooms - {"tests"} <= set(FLOORS)


# FEATURES A gives these their parameters
PUBLIC = {"train.train_model_simple", "data.create_dataloader_v1"}
MOST_LINES = {"train.training_loop": 80, "environment._prepare": 50}


def test_functions_are_short_and_take_few_positional_parameters():
    for module, node in nodes():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{module}.{node.name}"
            lines = node.end_lineno - node.lineno + 1
            assert lines <= MOST_LINES.get(name, 60), name
            parameters = {a.arg for a in node.args.posonlyargs + node.args.args}
            assert len(parameters - {"self", "cls"}) <= 6 or name in PUBLIC, name
    assert len((REPOSITORY / "environment.py").read_text("utf-8").splitlines()) <= 400
    assert len([*REPOSITORY.glob("*.py")]) == 9


MAPS = {"README.md": "The map", "docs/architecture.md": "The rooms"}
MAPS |= {"README.zh-CN.md": "代码结构", "docs/architecture.zh-CN.md": "代码结构"}


@pytest.mark.parametrize("page", MAPS)
def test_the_map_has_every_room_that_is_there(page):
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    section = text.split(f"\n## {MAPS[page]}\n")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`[^|]+) \|", section, re.MULTILINE)  # of the first column
    named = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    packages = {f"{path.parent.name}/" for path in REPOSITORY.glob("*/__init__.py")}
    root = {path.name for path in REPOSITORY.glob("*.py")} | {"config.json"}
    assert len(named) == len(set(named))
    assert packages | root <= set(named)
    assert [name for name in named if not (REPOSITORY / name).exists()] == []
    if page.startswith("docs/"):  # from the top floor to the bottom
        rooms = [name.removesuffix("/").removesuffix(".py") for name in named]
        floors = [FLOORS[room] for room in rooms if room != "config.json"]
        assert floors == sorted(floors, reverse=True)


def test_only_the_loss_room_computes_cross_entropy():
    losses = ("cross_entropy", "nll_loss", "softmax", "log_softmax", "logsumexp")
    users = {
        name for name, node in nodes() if getattr(node, "attr", getattr(node, "id", "")) in losses
    }
    # attention and sampling have probabilities too
    assert users == {"engine.loss", "engine.attention", "generation"}


def test_nothing_can_run_code_from_a_file_that_is_loaded():
    banned = {"pickle", "eval", "exec"}
    assert [name for name, node in nodes() if getattr(node, "id", "") in banned] == []
    assert [name for name, tree in sources().items() if banned & imports(tree)] == []


def test_importing_a_room_does_no_work():
    """At module level stand only imports, definitions, constants and a program's main guard."""
    allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)
    allowed += (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for name, tree in sources().items():
        for node in tree.body:
            code = "" if isinstance(node, allowed) else ast.unparse(node)
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            guard = code.startswith("if TYPE_CHECKING:")
            if name.split(".")[0] in PROGRAMS:
                guard |= code.startswith("if __name__")
                # a program may say how torch's libraries are to behave, before it imports torch
                guard |= code.startswith("os.environ.setdefault")
            assert not code or docstring or guard, f"{name} line {node.lineno}"
