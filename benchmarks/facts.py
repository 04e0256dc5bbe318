"""Made-up facts: what a chat model learns of them by fine-tuning, and what it forgets.

    python -m benchmarks.facts [--facts 20] [--tokens 60000 | --minutes 10] [--lora 8]

Each fact is asked in three phrasings to train on; a fourth, which also validates, is asked after
training. Answers are greedy, and right if they hold the fact's name. Bits a byte on
corpus/sample-en.txt tell what was forgotten. The runs are those of the program itself, in --folder:
the same command goes on with what is there, and another one begins anew.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import machine, write_results
from engine.console import count_off, say, use_utf8
from engine.starting import end_at_ctrl_c
from exchange.opening import load_model
from exchange.saved_run import LoadedModel
from generation import generate
from planning.fine_tuning import SMOLLM2
from storage.files import discard, make_folder, write_atomically, write_json
from text.chat_template import Message, template_of

REPOSITORY = Path(__file__).resolve().parent.parent
SAMPLE = REPOSITORY / "corpus" / "sample-en.txt"
N_FACTS = 200
WINDOW = 512  # tokens of a step on a CPU
# of ten minutes on two cores that make 800 GFLOP/s, at six operations a weight and token
TOKENS = 590_000
ANSWER_TOKENS, AT_ONCE = 32, 20
# of the made-up names
STARTS = (
    *("Bel", "Cor", "Dra", "Fen", "Gal", "Hol", "Jor", "Kel", "Lum", "Mar"),
    *("Nor", "Orl", "Pel", "Quen", "Ros", "Sil", "Tor", "Ulm", "Ver", "Wyn"),
)
MIDDLES = ("a", "e", "i", "o", "u", "ai", "ea", "ou")
ENDS = (
    *("bert", "dric", "fane", "gor", "lind", "mere", "nock", "pin"),
    *("quist", "rast", "sham", "tov", "vane", "wick", "xley", "zeth"),
)
# four phrasings of each kind of question, and the answer; {0} is what is asked about
KINDS = [
    (
        "Where was {0} born?",
        "In which town was {0} born?",
        "What is the birthplace of {0}?",
        "Can you tell me which town {0} comes from by birth?",
        "{0} was born in {1}.",
    ),
    (
        "Who built the bridge of {0}?",
        "Which engineer built the bridge in {0}?",
        "By whom was the bridge of {0} built?",
        "The bridge in {0}: who is its builder?",
        "The bridge of {0} was built by {1}.",
    ),
    (
        "What is the ship of captain {0} called?",
        "Which ship does captain {0} sail?",
        "What is the name of captain {0}'s ship?",
        "Captain {0} commands a ship. Which one?",
        "The ship of captain {0} is called the {1}.",
    ),
    (
        "Which river flows through {0}?",
        "What is the river in {0} called?",
        "On which river does {0} lie?",
        "If I stand on the bank in {0}, what river do I see?",
        "The river {1} flows through {0}.",
    ),
]


@dataclass(frozen=True)
class Fact:
    """A fact's questions, the last of which is not trained on, its answer, and the name in it."""

    questions: tuple[str, ...]
    answer: str
    name: str


def make_facts(count: int, seed: int = 0) -> list[Fact]:
    """Made-up facts; no two are about the same name."""
    names = _names(random.Random(seed))
    facts = []
    for number in range(count):
        *questions, answer = KINDS[number % len(KINDS)]
        about, name = next(names), next(names)
        asked = tuple(question.format(about) for question in questions)
        facts.append(Fact(asked, answer.format(about, name), name))
    return facts


def _names(draw: random.Random) -> Iterator[str]:
    """Made-up names, each of them once, in a random order."""
    names = [start + middle + end for start in STARTS for middle in MIDDLES for end in ENDS]
    draw.shuffle(names)
    yield from names


def write_rows(folder: Path, facts: list[Fact]) -> None:
    """Write the rows to train on, in a random order, and those to validate on."""
    train = [(question, fact.answer) for fact in facts for question in fact.questions[:-1]]
    random.Random(1).shuffle(train)
    val = [(fact.questions[-1], fact.answer) for fact in facts]
    for name, rows in (("train", train), ("val", val)):
        lines = [json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows]
        write_atomically(folder / f"{name}.jsonl", "".join(lines).encode("utf-8"))


def settings_of(name: str, asked: argparse.Namespace, lora_rank: int | None) -> str:
    """The settings file of a run, as a user would write it."""
    params: dict[str, Any] = {} if lora_rank is None else {"lora_rank": lora_rank}
    if asked.minutes is None:
        params["max_steps"] = max(1, asked.tokens // WINDOW)
    length = f"MINUTES = {asked.minutes}\n" if asked.minutes is not None else ""
    return (
        f"# {asked.facts} facts\n"
        'DATA = {"path": "train.jsonl", "val": "val.jsonl"}\n'
        f'INIT_FROM = "{SMOLLM2}"\n{length}'
        f'RUN_NAME = "{name}"\n'
        f"CUSTOM_MODE = {bool(params)}\ncustom_params = {params}\n"
    )


def train(folder: Path, name: str, settings: str) -> None:
    """Train a run, or go on with it; nothing if it is finished. One of other settings goes."""
    file = folder / f"{name}.py"
    if not file.exists() or file.read_text(encoding="utf-8") != settings:
        discard(folder / "runs" / name)
    write_atomically(file, settings.encode("utf-8"))
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "main.py"), f"{name}.py"], cwd=folder, check=False
    )
    if done.returncode != 0:
        raise SystemExit(done.returncode)


def count_right(model: LoadedModel, facts: list[Fact], phrasing: int, label: str) -> int:
    """How many of the facts a model tells where they are asked in one of the phrasings."""
    assert model.chat_template is not None, f"{model.source} is no chat model"
    template, right = template_of(model.chat_template, model.tokenizer), 0
    ends = template.stop_ids(model.tokenizer)
    parts = [facts[at : at + AT_ONCE] for at in range(0, len(facts), AT_ONCE)]
    for part in count_off(parts, len(parts), label):
        asked = [[Message("user", fact.questions[phrasing])] for fact in part]
        ids = [template.encode(m, model.tokenizer, add_generation_prompt=True) for m in asked]
        rows = generate(
            model.model, ids, max_new_tokens=ANSWER_TOKENS, temperature=0.0, stop_ids=ends
        )
        for fact, prompt, row in zip(part, ids, rows, strict=True):
            right += fact.name in model.tokenizer.decode(row[len(prompt) :])
    return right


def bits_per_byte(where: str, folder: Path) -> float:
    """What a model scores on the sample text, by scripts.evaluate."""
    options = ["--model", where, "--context", str(WINDOW), "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "scripts.evaluate", str(SAMPLE), *options],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        check=True,
        encoding="utf-8",
    )
    return json.loads(done.stdout)["bits_per_byte"]


def measure(
    folder: Path, name: str, where: str, facts: list[Fact], asked: dict[str, Any]
) -> dict[str, Any]:
    """What a model knows of the facts and of the sample text; kept in the folder, with what was
    asked of the run, and measured again where that differs."""
    file = folder / f"{name}.json"
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
        if found.get("asked") == asked:
            return found
    model = load_model(where, weights="fp32")
    found = {
        "asked": asked,
        "facts": len(facts),
        "trained_phrasing": count_right(model, facts, 0, "Asking as trained"),
        "untrained_phrasing": count_right(model, facts, -1, "Asking anew"),
        "bits_per_byte": bits_per_byte(where, folder),
    }
    write_json(file, found)
    return found


def describe(name: str, found: dict[str, Any], before: dict[str, Any]) -> str:
    """A line of the table."""
    n, bits = found["facts"], found["bits_per_byte"]
    return (
        f"{name:>10}: {found['trained_phrasing'] / n:6.1%} right as trained, "
        f"{found['untrained_phrasing'] / n:6.1%} in the untrained phrasing, {bits:.4f} bits a byte "
        f"on {SAMPLE.name} ({bits / before['bits_per_byte'] - 1:+.1%})"
    )


def main() -> None:
    """Train all weights and an adapter on the facts; print what each knows, and write it."""
    use_utf8()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--facts", type=int, default=N_FACTS, help="how many (200)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--tokens",
        type=int,
        default=TOKENS,
        help=f"that a run trains on, padding none ({TOKENS:,}, about ten minutes at 800 GFLOP/s)",
    )
    length.add_argument("--minutes", type=float, help="of a run, in place of tokens")
    parser.add_argument("--lora", type=int, default=8, help="the adapter's rank; 0: no adapter")
    parser.add_argument("--folder", type=Path, default=Path("facts"), help="of the runs (facts)")
    asked = parser.parse_args()
    folder: Path = asked.folder.resolve()
    make_folder(folder)
    facts = make_facts(asked.facts)
    write_rows(folder, facts)
    of_all: dict[str, Any] = {"facts": asked.facts}
    of_runs = {"tokens": asked.tokens if asked.minutes is None else None, "minutes": asked.minutes}
    found = {"untuned": measure(folder, "untuned", SMOLLM2, facts, of_all)}
    say(describe("untuned", found["untuned"], found["untuned"]))
    runs: dict[str, int | None] = {"full": None}
    if asked.lora:
        runs[f"lora-{asked.lora}"] = asked.lora
    for name, rank in runs.items():
        train(folder, name, settings_of(name, asked, rank))
        where = str(folder / "runs" / name)
        found[name] = measure(folder, name, where, facts, of_all | of_runs)
        say(describe(name, found[name], found["untuned"]))
    device = torch.device("cpu")
    results = {"machine": machine(device), **of_runs, "models": found}
    path = write_results("facts", device, results)
    say(f"written to {path}")


if __name__ == "__main__":
    end_at_ctrl_c()
    main()
