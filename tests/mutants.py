"""Whether tests notice a wrong line: seeded mutants of some rooms, each run against their tests.

python -m tests.mutants [--count 120] [--seed 0] [--room storage] [--at COMMIT]

A mutant has one comparison turned, one whole number off by one, or one statement left out. It is
killed where a test file of its room fails, or takes far longer than without it. Prints a line for
each that survives, to be judged: a change of a message, or provably none, does not count. --at
takes program and tests as they were at a commit, so that two shares can be compared.
"""

import argparse
import ast
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
ROOMS = {  # the files that are changed, and those that must notice it
    "planning": (
        ["planning/*.py"],
        [
            "test_choices",
            "test_environment",
            "test_machine",
            "test_pretended_gpus",
            "test_recipe",
            "test_runs",
            "test_settings",
            "test_short_epochs",
            "test_trial",
        ],
    ),
    "training": (
        ["training/*.py"],
        [
            "test_train",
            "test_journal",
            "test_memory",
            "test_pace",
            "test_short_epochs",
            "test_run_folder",
        ],
    ),
    "storage": (["storage/*.py"], ["test_storage", "test_checkpoint", "test_tracking"]),
    "loss": (["engine/loss.py"], ["test_loss", "test_model"]),
    "generation": (
        ["generation.py"],
        ["test_generation", "test_recorded_decoding", "test_sampling"],
    ),
    "data": (["data.py"], ["test_data"]),
}
TURNED = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
LEFT_OUT = (ast.Assign, ast.AugAssign, ast.Expr, ast.Raise, ast.Return, ast.Delete)


@dataclass(frozen=True)
class Mutant:
    """A change of one file: what is written in place of the text from start to stop."""

    room: str
    file: str
    line: int
    start: int  # bytes, as ast counts them
    stop: int
    text: str

    def shown(self, source: bytes) -> str:
        before = b" ".join(source[self.start : self.stop].split()).decode()
        return f"{self.file}:{self.line}: {before[:70]}  ->  {self.text[:70]}"


def mutants_of(room: str, file: str, source: bytes) -> Iterator[Mutant]:
    """Every mutant of a file, in the order of its lines."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    tree = ast.parse(source)
    texts = {  # docstrings and parts of messages
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        for inner in ast.walk(node)
    }

    def change(node: ast.AST, text: str) -> Mutant:
        start = starts[node.lineno - 1] + node.col_offset
        stop = starts[node.end_lineno - 1] + node.end_col_offset
        return Mutant(room, file, node.lineno, start, stop, text)

    for node in ast.walk(tree):
        if id(node) in texts:
            continue
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            turned = ast.Compare(node.left, [TURNED[type(node.ops[0])]()], node.comparators)
            yield change(node, f"({ast.unparse(turned)})")
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            yield change(node, str(node.value + 1))
        elif isinstance(node, LEFT_OUT):
            yield change(node, "pass")


def is_killed(mutant: Mutant, tree: Path, limit_s: float) -> bool:
    """Whether the tests of its room fail with a mutant in place; the file is as before then."""
    path = tree / mutant.file
    source = path.read_bytes()
    path.write_bytes(source[: mutant.start] + mutant.text.encode() + source[mutant.stop :])
    try:
        return not passes(mutant.room, tree, limit_s)
    finally:
        path.write_bytes(source)


def passes(room: str, tree: Path, limit_s: float) -> bool:
    """Whether the test files of a room pass in a tree, within so many seconds."""
    files = [f"tests/{name}.py" for name in ROOMS[room][1]]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run([*command, *files], cwd=tree, capture_output=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--room", choices=ROOMS, action="append")
    parser.add_argument("--at", default="HEAD", metavar="COMMIT")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "main"
        subprocess.run(["git", "worktree", "add", "--detach", tree, asked.at], check=True)
        (Path(folder) / "shared").symlink_to(REPOSITORY.parent / "shared")
        try:
            report(asked, tree)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], check=True)


def report(asked: argparse.Namespace, tree: Path) -> None:
    """Draw the mutants, run them and print what came of it."""
    rooms = asked.room or list(ROOMS)
    found = [
        mutant
        for room in rooms
        for pattern in ROOMS[room][0]
        for path in sorted(tree.glob(pattern))
        for mutant in mutants_of(room, str(path.relative_to(tree)), path.read_bytes())
    ]
    drawn = random.Random(asked.seed).sample(found, min(asked.count, len(found)))
    drawn.sort(key=lambda mutant: (rooms.index(mutant.room), mutant.file, mutant.start))
    limits: dict[str, float] = {}
    killed: Counter[str] = Counter()
    total = Counter(mutant.room for mutant in drawn)
    for mutant in drawn:
        if mutant.room not in limits:
            started_at = time.monotonic()
            if not passes(mutant.room, tree, 3600):
                raise SystemExit(f"the tests of {mutant.room} fail without any mutant")
            limits[mutant.room] = 30 + 4 * (time.monotonic() - started_at)
        if is_killed(mutant, tree, limits[mutant.room]):
            killed[mutant.room] += 1
        else:
            print(f"survives: {mutant.shown((tree / mutant.file).read_bytes())}", flush=True)
    for room in total:
        print(f"{room}: {killed[room]} of {total[room]} killed")
    print(f"{killed.total()} of {total.total()} killed ({killed.total() / total.total():.0%})")


if __name__ == "__main__":
    main()
