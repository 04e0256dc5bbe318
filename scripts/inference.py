"""Continue a text with a trained model:  python -m scripts.inference --prompt "Once upon a time"

Standard output gets the results only: each prompt and its continuation, without control
characters, which a terminal would obey. --json keeps them, escaped.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from engine.starting import end_at_ctrl_c

if __name__ == "__main__":
    end_at_ctrl_c()

import torch

from engine.console import tell
from engine.errors import DataError, SettingsError
from engine.settings import raise_if_any, shown
from exchange.saved_run import LoadedModel
from generation import stream_text
from insight.copies import LEAST, Copy, CopyIndex, covered, find_copies, open_index
from insight.run_text import open_run_text
from scripts.options import (
    add_run_options,
    add_sampling_options,
    add_stop_option,
    describe,
    load,
    new_parser,
    run_program,
    sampling_of,
    seed_of,
    to_json_line,
    whole,
    write,
)
from storage.cache import usable_cache
from text.tokenizer import encode_from_start

MOST_ROWS = 8  # samples in one batch, unless one prompt has more
MOST_SAMPLES = 100
COPIED = "⟦", "⟧"  # around a copied part of a text
BEGINNING = 40  # characters of one that are shown with its place
MOST_BYTES = 16 << 20  # of a prompt file; a model reads the newest few thousand


def main() -> int:
    """Read the options and prompts, load the run and print its continuations; returns 0."""
    arguments = _parser().parse_args()
    prompts = read_prompts(arguments)
    _check(arguments, len(prompts))
    run = load(arguments)
    index = _open_index(run) if arguments.show_copies else None
    seed = seed_of(arguments)
    tell(f"{describe(run)}, seed {seed}")
    for prompt in prompts:
        say_if_cut(run, prompt)
    options = sampling_of(arguments, run) | {
        "stop": arguments.stop,
        "num_samples": arguments.num_samples,
        "generator": torch.Generator(device=run.device).manual_seed(seed),
    }
    if arguments.stream:
        write(prompts[0])
        for piece in stream_text(run.model, run.tokenizer, prompts, **options):
            write(piece.text)
        write("\n")
        return 0
    facts = {"seed": seed, "run": str(run.path or run.name), "step": run.step}
    batch = max(1, MOST_ROWS // arguments.num_samples)
    for first in range(0, len(prompts), batch):
        samples = continue_texts(run, prompts[first : first + batch], options)
        for row, sample in enumerate(samples):
            copies = [] if index is None else find_copies(index, sample["text"])
            if arguments.json:
                found = {} if index is None else {"copies": list(map(asdict, copies))}
                write(to_json_line(sample | found | facts))
            else:
                number = first * arguments.num_samples + row
                write(_headline(number, len(prompts), arguments.num_samples))
                write(f"{sample['prompt']}{mark_copies(sample['text'], copies)}\n")
                if index is not None:
                    write(_about_copies(sample["text"], copies))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    group = parser.add_argument_group("prompts (without one, standard input is read)")
    group.add_argument(
        "--prompt",
        metavar="TEXT",
        action="append",
        type=whole,
        default=[],
        help='go on from this text; may be repeated; "" begins as a document does',
    )
    group.add_argument(
        "--prompt-file",
        metavar="FILE",
        help='go on from the text of a UTF-8 file; "-" is standard input',
    )
    group.add_argument(
        "--lines", action="store_true", help="each line of the file or input is a prompt"
    )
    group = parser.add_argument_group("the result")
    group.add_argument(
        "--num-samples",
        metavar="N",
        type=int,
        default=1,
        help=f"texts for each prompt, up to {MOST_SAMPLES} (1)",
    )
    add_stop_option(group)
    group.add_argument(
        "--stream", action="store_true", help="show the text as it is drawn: of one prompt, once"
    )
    group.add_argument(
        "--json",
        action="store_true",
        help="a JSON object a text and line: prompt, text, finish_reason, tokens with their "
        "probabilities, seed, run, step",
    )
    group.add_argument(
        "--show-copies",
        action="store_true",
        help=f"mark {'...'.join(COPIED)} what stands word for word in the run's training text, in "
        f"{LEAST} bytes or more, and list where",
    )
    add_run_options(parser)
    add_sampling_options(parser)
    return parser


def _check(arguments: argparse.Namespace, n_prompts: int) -> None:
    """Raise SettingsError with every wrong option and combination of options."""
    problems = []
    if not 1 <= arguments.num_samples <= MOST_SAMPLES:
        problems.append(f"--num-samples is {arguments.num_samples}; it must be 1 to {MOST_SAMPLES}")
    if arguments.stream and (n_prompts > 1 or arguments.num_samples > 1):
        problems.append("--stream shows a single text; ask for one prompt and one sample")
    if arguments.stream and arguments.json:
        problems.append("--stream and --json don't go together: an object is written when whole")
    if arguments.show_copies and arguments.stream:
        problems.append("--stream and --show-copies don't go together: a copy is known at its end")
    if arguments.show_copies and any(model.option != "run" for model in arguments.models or []):
        problems.append("--show-copies is for runs, whose training text is known; not for --model")
    raise_if_any(problems, "the options")


def _open_index(run: LoadedModel) -> CopyIndex:
    """The index of a run's training text. Raises DataError if that is gone or has changed."""
    assert run.path is not None, "_check() has refused other models"
    index = open_index(open_run_text(run.path), usable_cache())
    if index.share < 1:
        tell(f"Note: copies are looked for in {index.share:.0%} of the training text: it is large")
    return index


def mark_copies(text: str, copies: Sequence[Copy]) -> str:
    """A text with its copied parts marked; those that touch or overlap are one."""
    marked, at = [], 0
    for start, stop in covered(copies):
        marked += [text[at:start], COPIED[0], text[start:stop], COPIED[1]]
        at = stop
    return "".join([*marked, text[at:]])


def _about_copies(text: str, copies: Sequence[Copy]) -> str:
    """The lines below a text: how much of it is copied, and where each part stands."""
    n_copied = sum(stop - start for start, stop in covered(copies))
    lines = [f"copied: {n_copied:,} of {len(text):,} characters"]
    for copy in copies:
        begins, before = (" ".join(part.split()) for part in (copy.text[:BEGINNING], copy.before))
        place = f'behind "{before}"' if before else "where a document begins"
        lines.append(
            f'  "{begins}...", {len(copy.text):,} characters: in the training text at byte '
            f"{copy.source:,}, {place}"
        )
    return "\n".join(lines) + "\n"


def _headline(number: int, n_prompts: int, n_samples: int) -> str:
    """The line above a sample, which is numbered from 0; empty if there is only one."""
    prompt, sample = divmod(number, n_samples)
    parts = [f"prompt {prompt + 1} of {n_prompts}"] if n_prompts > 1 else []
    parts += [f"sample {sample + 1} of {n_samples}"] if n_samples > 1 else []
    gap = "\n" if number else ""
    return f"{gap}--- {', '.join(parts)} ---\n" if parts else ""


def read_prompts(arguments: argparse.Namespace) -> list[str]:
    """The prompts of --prompt, then those of --prompt-file; without both, of standard input.

    A file is one prompt, without its last line end; with --lines, every line that is not blank is
    one. Raises SettingsError if there is no prompt, DataError if one can't be read.
    """
    file = arguments.prompt_file
    if file is None and not arguments.prompt and sys.stdin is not None and not sys.stdin.isatty():
        file = "-"
    if file is None:
        if not arguments.prompt:
            raise SettingsError(
                'there is no prompt. Give --prompt "TEXT", --prompt-file FILE, or text on standard '
                'input;\n--prompt "" begins as a document does.'
            )
        if arguments.lines:
            raise SettingsError("--lines is for --prompt-file or standard input; leave it out.")
        return arguments.prompt
    name = "standard input" if file == "-" else file
    text = _read_file(file, name)
    if not arguments.lines:
        return [*arguments.prompt, text.removesuffix("\n").removesuffix("\r")]
    lines = [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
    if not lines:
        raise DataError(f"{name} has no line with text in it; --lines makes each one a prompt.")
    return [*arguments.prompt, *lines]


def _read_file(file: str, name: str) -> str:
    """The text of a file, or of standard input for "-"; messages call it name."""
    try:
        if file != "-":
            with open(file, "rb") as opened:
                content = opened.read(MOST_BYTES + 1)
        elif sys.stdin is None:
            raise DataError("standard input is closed; give --prompt or --prompt-file.")
        else:
            content = sys.stdin.buffer.read(MOST_BYTES + 1)
        text = content.decode("utf-8")
    except OSError as error:
        raise DataError(f"can't read {name}: {error.strerror or error}.") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} is not UTF-8: byte {error.start} is 0x{content[error.start]:02x}.\n"
            "Save it as UTF-8."
        ) from None
    if len(content) > MOST_BYTES:
        raise DataError(f"{name} has more than {MOST_BYTES >> 20} MB; shorten it: the end counts.")
    return text.removeprefix("\ufeff")


def say_if_cut(run: LoadedModel, prompt: str) -> None:
    """Say on standard error how much of a prompt is read if it is longer than the context."""
    context, length = run.model.config.context_length, len(encode_from_start(run.tokenizer, prompt))
    if length > context:
        tell(
            f"Note: the prompt {shown(prompt[:20])}... has {length:,} tokens and the model's "
            f"context {context:,}: it reads the last {max(1, context // 2):,}"
        )


def continue_texts(
    run: LoadedModel, prompts: list[str], options: dict[str, Any]
) -> list[dict[str, Any]]:
    """Continue prompts as one batch; returns a dict for each sample, in the order of the prompts.

    It has prompt, text, finish_reason ("stop" or "length") and tokens. Each token has id, text (the
    characters that it completes, or None) and probability.
    """
    rows = [prompt for prompt in prompts for _ in range(options["num_samples"])]
    samples: list[dict[str, Any]] = [
        {"prompt": prompt, "text": "", "finish_reason": "", "tokens": []} for prompt in rows
    ]
    begun = (encode_from_start(run.tokenizer, prompt) for prompt in prompts)
    decoders = [run.tokenizer.decoder(ids) for ids in begun for _ in range(options["num_samples"])]
    for piece in stream_text(run.model, run.tokenizer, prompts, **options):
        sample, decoder = samples[piece.row], decoders[piece.row]
        is_end = piece.token.id == run.tokenizer.end_of_text_id
        text = "" if is_end else decoder.add(piece.token.id)
        if piece.finish is not None:
            sample["finish_reason"] = piece.finish
            text += decoder.finish()
        sample["text"] += piece.text
        sample["tokens"].append(
            {
                "id": piece.token.id,
                "text": text or None,
                "probability": min(1.0, math.exp(piece.token.logprob)),  # rounding may exceed 1
            }
        )
    return samples


if __name__ == "__main__":
    run_program(main)
