"""Train a byte-level BPE in a child process, which can be ended at every moment.

The library tokenizers answers no signal while it trains. The child reads texts from its standard
input, each a line with its length in bytes and then UTF-8, up to an empty line; it writes the
vocabulary as JSON to its standard output.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from engine.errors import ResourceError
from text.tokenizer_file import byte_symbols

REPOSITORY = Path(__file__).resolve().parent.parent
MOST_DISTINCT = 4 << 20  # bytes of different words to train on: training takes 100 bytes for each
PROGRAM = (
    "import sys; from text.learn_bpe import train_here; train_here(int(sys.argv[1]), sys.argv[2])"
)
_WORDS = re.compile(r" ?[^\W_]{1,64}|[^\w\s]{1,64}")  # about those of the pattern


def learn_bpe(texts: Iterable[str], vocab_size: int, pattern: str) -> dict[str, int]:
    """Train a byte-level BPE on texts, cut into words by pattern, in a child process.

    Takes texts until their different words have MOST_DISTINCT bytes. Returns the ids of its tokens
    in byte symbols. An exception, such as KeyboardInterrupt, ends the child. Raises ResourceError
    if the child fails.
    """
    command = [sys.executable, "-c", PROGRAM, str(vocab_size), pattern]
    with (
        tempfile.TemporaryFile() as answer,
        subprocess.Popen(
            command,
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=answer,
            start_new_session=True,  # a terminal's Ctrl-C is for the parent, which ends the child
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # the same on Windows
        ) as child,
    ):
        try:
            _send(child, until_distinct(texts))
            while child.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(0.2)  # on Windows, Ctrl-C works only between waits
        finally:
            child.kill()
            with contextlib.suppress(OSError):  # the rest of a text for a child that has ended
                child.stdin.close()  # type: ignore[union-attr]
        if child.returncode:
            raise ResourceError(
                f"the process that trains the tokenizer failed with status {child.returncode}.\n"
                'Memory may have run out: set TOKENIZER to "char" or a smaller "bpe:" size.'
            )
        answer.seek(0)
        return json.load(answer)


def _send(child: subprocess.Popen[bytes], texts: Iterable[str]) -> None:
    for text in texts:
        content = text.encode("utf-8", "replace")
        if content:
            try:
                child.stdin.write(b"%d\n" % len(content) + content)  # type: ignore[union-attr]
            except BrokenPipeError:  # its status tells what happened
                return
    with contextlib.suppress(BrokenPipeError):
        child.stdin.write(b"\n")  # type: ignore[union-attr]
        child.stdin.flush()  # type: ignore[union-attr]


def until_distinct(texts: Iterable[str]) -> Iterator[str]:
    """Yield texts until their different words have MOST_DISTINCT bytes."""
    seen: set[str] = set()
    n_bytes = 0
    for text in texts:
        yield text
        new = set(_WORDS.findall(text)) - seen
        n_bytes += sum(len(word.encode("utf-8", "replace")) for word in new)
        if n_bytes >= MOST_DISTINCT:
            return
        seen |= new


def train_here(vocab_size: int, pattern: str) -> None:
    """Train on the texts of standard input, print the vocabulary and end the process."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    trainable = Tokenizer(models.BPE())
    trainable.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=sorted(byte_symbols()), show_progress=False
    )
    trainable.train_from_iterator(_received(), trainer)
    json.dump(json.loads(trainable.to_str())["model"]["vocab"], sys.stdout)
    sys.stdout.flush()
    os._exit(0)  # the thread still reads


def _received() -> Iterator[str]:
    while length := sys.stdin.buffer.readline():
        if length == b"\n":
            threading.Thread(target=_end_with_parent, daemon=True).start()
            return
        yield sys.stdin.buffer.read(int(length)).decode("utf-8")
    os._exit(1)  # the parent has ended


def _end_with_parent() -> None:
    """Wait for the end of standard input: until then the parent lives."""
    sys.stdin.buffer.read()
    os._exit(1)
