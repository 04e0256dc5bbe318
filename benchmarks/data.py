"""Data speed: tokenizing a text compared with tiktoken alone, and batches with `datasets`.

    python -m benchmarks.data [megabytes] [rounds]
    python -m benchmarks.data --any [megabytes ...] [kinds or tokenizers ...]

Each measurement has its own process, and the contenders take turns. The text is real text,
repeated with some words swapped. tiktoken alone encodes documents in memory on all cores;
preparing a text also reads, decodes, hashes, splits and writes it.

--any prepares texts of one line without a blank with every tokenizer, of 10 and 100 MB each:
"dna", "base64", "letter", "thai", "chinese", "javascript", "printable" x "char", "bpe:300",
"bpe:4096", "gpt2". Its factors compare processor times, which other programs hardly change.
"""

import importlib.util
import json
import math
import os
import random
import shutil
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.peer_job import peak_bytes
from benchmarks.report import machine, write_results
from data import TokenSlice, make_loaders, plan_windows
from engine.console import say, use_utf8
from text.sources import parse_data
from text.token_cache import tokenize
from text.tokenizer import GPT2Tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCES = tuple(
    REPOSITORY / name
    for name in ("corpus/sample-en.txt", "README.md", "docs/settings.md", "docs/use.md")
)
BATCH_SIZE, MAX_LENGTH, BATCHES = 16, 256, 2000


def main(megabytes: int = 200, rounds: int = 3) -> None:
    """Measure, print and write the results."""
    use_utf8()
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        make_text(text, megabytes * 1_000_000)
        say(f"{text.stat().st_size / 1e6:,.0f} MB of text")
        raw, prepared, again = [], [], []
        for round_number in range(rounds):
            raw.append(in_a_process("raw", text, folder))
            cache = Path(folder, f"cache-{round_number}")
            prepared.append(in_a_process("prepare", text, cache))
            again.append(in_a_process("prepare", text, cache))
        loader = in_a_process("loader", text, cache)
        has_peer = importlib.util.find_spec("datasets") is not None
        peer = in_a_process("datasets", text, cache) if has_peer else None
    rates = {
        "tiktoken_mb_per_s": statistics.median(row["mb_per_s"] for row in raw),
        "prepared_mb_per_s": statistics.median(row["mb_per_s"] for row in prepared),
    }
    ratio = statistics.median(
        p["mb_per_s"] / r["mb_per_s"] for p, r in zip(prepared, raw, strict=True)
    )
    peak = max(row["peak_mb_above_torch"] for row in prepared)
    found_s = statistics.median(row["seconds"] for row in again)
    say(f"tiktoken alone      {rates['tiktoken_mb_per_s']:.1f} MB/s")
    say(f"prepared            {rates['prepared_mb_per_s']:.1f} MB/s, {ratio:.2f} of it")
    say(f"peak memory         {peak:.0f} MB above the import of torch")
    say(f"found again in      {found_s:.3f} s")
    say(f"batches             {loader['batches_per_s']:,.0f}/s of {BATCH_SIZE} x {MAX_LENGTH}")
    if peer:
        say(f"batches, datasets   {peer['batches_per_s']:,.0f}/s")
    else:
        say("batches, datasets   not measured: pip install -r requirements.txt datasets")
    results = rates | {
        "machine": machine(torch.device("cpu")),
        "megabytes": megabytes,
        "ratio": ratio,
        "peak_mb_above_torch": peak,
        "found_again_s": found_s,
        "batches_per_s": loader["batches_per_s"],
        "datasets_batches_per_s": peer and peer["batches_per_s"],
        "rounds": {"raw": raw, "prepared": prepared, "again": again},
    }
    say(f"written to {write_results('data', torch.device('cpu'), results)}")


def make_text(path: Path, size: int) -> None:
    """Write size bytes of the sources' paragraphs in random order, with some words swapped."""
    chooser = random.Random(0)
    paragraphs = [
        paragraph
        for source in SOURCES
        for paragraph in source.read_text(encoding="utf-8").splitlines()
        if paragraph.strip()
    ]
    written = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        while written < size:
            words = chooser.choice(paragraphs).split(" ")
            for _ in range(1 + len(words) // 20):
                words[chooser.randrange(len(words))] = chooser.choice(words)
            line = " ".join(words) + "\n"
            written += len(line.encode("utf-8"))
            file.write(line)


def any_text(*names: str) -> None:
    """Prepare the texts of KINDS, of some sizes with some tokenizers, print and write the rates.

    The results are written after each kind, so that they outlast an interruption.
    """
    use_utf8()
    sizes = [int(name) for name in names if name.isdecimal()] or [10, 100]
    kinds = [name for name in names if name in KINDS] or list(KINDS)
    tokenizers = [name for name in names if name in TOKENIZERS] or TOKENIZERS
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            for megabytes in sizes:
                text, cache = Path(folder, "text.txt"), Path(folder, "cache")
                make_line(text, kind, megabytes * 1_000_000)
                for tokenizer in tokenizers:
                    found = in_a_process(f"prepare {tokenizer}", text, cache)
                    shutil.rmtree(cache)
                    row = {"kind": kind, "megabytes": megabytes, "tokenizer": tokenizer} | found
                    row["factor"] = factor_of(row, rows)
                    rows.append(row)
                    say(
                        f"{kind:10} {megabytes:4} MB  {tokenizer:8} {found['seconds']:7.1f} s  "
                        f"processor {found['cpu_s']:6.1f} s, {row['factor']:4.2f} of linear  "
                        f"{found['peak_mb']:5.0f} MB, training {found['peak_mb_training']:.0f} MB"
                    )
            results = {"machine": machine(torch.device("cpu")), "rows": rows}
            written = write_results("any-text", torch.device("cpu"), results)
    say(f"written to {written}")


def factor_of(row: dict, rows: list[dict]) -> float:
    """How much more processor time a byte takes than in the smallest text of its kind."""
    alike = [r for r in rows if all(r[name] == row[name] for name in ("kind", "tokenizer"))]
    first = min(alike, key=lambda r: r["megabytes"], default=row)
    return row["cpu_s"] / first["cpu_s"] / (row["megabytes"] / first["megabytes"])


def make_line(path: Path, kind: str, size: int) -> None:
    """Write size bytes of one of KINDS in one line."""
    chooser, written = random.Random(0), 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        while written < size:
            text = "".join(chooser.choices(KINDS[kind], k=10_000))
            file.write(text)
            written += len(text.encode("utf-8"))


def in_a_process(part: str, text: Path, cache: Path | str) -> dict:
    """Run one of PARTS in its own process and return its measurement."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.data", "--part", *part.split(), str(text), str(cache)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure_raw(text: Path, _: Path) -> dict:
    """tiktoken's batch encoding on all cores, of documents of 2,000 lines in memory."""
    lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    documents = ["".join(lines[i : i + 2000]) for i in range(0, len(lines), 2000)]
    encoding = GPT2Tokenizer()._encoding
    started_at = time.perf_counter()
    encoding.encode_ordinary_batch(documents, num_threads=os.cpu_count() or 1)
    seconds = time.perf_counter() - started_at
    return {"seconds": seconds, "mb_per_s": text.stat().st_size / 1e6 / seconds}


def measure_prepare(text: Path, cache: Path, tokenizer: str = "gpt2") -> dict:
    """The preparation of a text, or its lookup where the cache has it."""
    before, before_s = peak_bytes() or math.nan, sum(os.times()[:4])
    started_at = time.perf_counter()
    tokenize(parse_data(str(text)), tokenizer, 0.9, cache)
    seconds = time.perf_counter() - started_at
    peak = peak_bytes() or math.nan
    return {
        "seconds": seconds,
        "cpu_s": sum(os.times()[:4]) - before_s,
        "mb_per_s": text.stat().st_size / 1e6 / seconds,
        "peak_mb": peak / (1 << 20),
        "peak_mb_above_torch": (peak - before) / (1 << 20),
        "peak_mb_training": peak_bytes_of_children() / (1 << 20),
    }


def peak_bytes_of_children() -> float:
    """The peak resident memory of the child that trained a tokenizer; NaN on Windows."""
    try:
        import resource
    except ImportError:
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure_loader(text: Path, cache: Path) -> dict:
    """Shuffled batches from this project's loader."""
    found = tokenize(parse_data(str(text)), "gpt2", 0.9, cache)
    plan, _ = plan_windows(
        found.n_tokens,
        max_length=MAX_LENGTH,
        stride=MAX_LENGTH,
        batch_size=BATCH_SIZE,
        train_ratio=0.9,
    )
    tokens = TokenSlice(found.path, found.dtype, 0, found.n_tokens)
    loader, _ = make_loaders(tokens, plan, seed=0, num_workers=0, device=torch.device("cpu"))
    return {"batches_per_s": batches_per_second(loader)}


def measure_datasets(text: Path, cache: Path) -> dict:
    """Shuffled batches of the same windows from an Arrow table of `datasets`."""
    import datasets

    found = tokenize(parse_data(str(text)), "gpt2", 0.9, cache)
    length = MAX_LENGTH + 1
    n_tokens = min(found.n_tokens, 4_000_000) // length * length
    tokens = TokenSlice(found.path, found.dtype, 0, n_tokens).array()
    rows = datasets.Dataset.from_dict({"ids": tokens.reshape(-1, length).astype(np.int32)})
    loader = torch.utils.data.DataLoader(
        rows.with_format("torch"), batch_size=BATCH_SIZE, shuffle=True
    )
    return {"batches_per_s": batches_per_second(loader)}


def batches_per_second(loader: torch.utils.data.DataLoader) -> float:
    """The rate of a loader's first BATCHES batches, without the very first."""
    batches = iter(loader)
    next(batches)
    started_at, count = time.perf_counter(), 0
    for count, _ in enumerate(batches, start=1):
        if count == BATCHES:
            break
    return count / (time.perf_counter() - started_at)


TOKENIZERS = ["char", "bpe:300", "bpe:4096", "gpt2"]
KINDS = {  # what a text is a random row of
    "dna": "ACGT",
    "base64": f"{string.ascii_letters}{string.digits}+/",
    "letter": "a",
    "thai": [chr(code) for code in range(0x0E01, 0x0E2F)] + list("ะาิีึืุู่้เแโใไ") * 2,
    "chinese": [chr(code) for code in range(0x4E00, 0x4E00 + 3000)],
    "javascript": ["function(e){", "return ", "var t=", "n[i]", ";", "}", "&&", "0x1f", *"abcxyz"],
    "printable": [chr(code) for code in range(33, 127)],
}
PARTS: dict[str, Callable[..., dict]] = {
    "raw": measure_raw,
    "prepare": measure_prepare,
    "loader": measure_loader,
    "datasets": measure_datasets,
}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        part, *options = sys.argv[2:-2]
        print(json.dumps(PARTS[part](*map(Path, sys.argv[-2:]), *options)))
    elif sys.argv[1:2] == ["--any"]:
        any_text(*sys.argv[2:])
    elif not all(argument.isdecimal() and int(argument) for argument in sys.argv[1:3]):
        sys.exit(__doc__)
    else:
        main(*map(int, sys.argv[1:3]))
