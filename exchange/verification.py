"""Is a model that was written elsewhere still the same? It is read back, and compared."""

import random
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from engine.errors import CheckpointError, SettingsError, first_line
from exchange.adapter import adapted
from exchange.opening import load_model
from exchange.saved_run import LoadedModel
from storage.checkpoint import weights_of
from text.tokenizer import BPETokenizer, encode_from_start

# how far a weight may be from ours: a share of the largest one of its tensor, and what the smallest
# numbers of fp16 are apart, of which 8-bit weights are 127 times as many
ROUNDING = {"fp32": 0.0, "fp16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 220}
SMALLEST = {"fp32": 0.0, "fp16": 2**-24, "bf16": 0.0, "q8_0": 127 * 2**-24}
# how far logits may be, in standard deviations of ours: the farthest by equal weights, by those of
# half precision, and by 8-bit ones the root of the mean square: of ten million logits, the farthest
# is ten times as far
SAME, HALF, EIGHT_BIT = 1e-3, 0.2, 0.05
PROBED_TOKENS = 256
N_TEXTS = 200
# the first and the last character of scripts, of control characters and of emoji
SCRIPTS = [
    ("\0", "\x1f"),
    (" ", "~"),
    ("\xa0", "\u024f"),
    ("\u0370", "\u05ff"),
    ("\u0900", "\u0eff"),
    ("\u2000", "\u2bff"),
    ("\u3040", "\u30ff"),
    ("\u4e00", "\u9fff"),
    ("\uac00", "\ud7a3"),
    ("\U0001f300", "\U0001faff"),
]
ODD_TEXTS = [
    *("", " ", "\n\n", "\t\tx\r\n", "a  b   c ", "don't we'll I'M", "x" * 200, "=" * 70),
    *("def f(x):\n    return x**2  # twice", "3.14159 1,000,000 ²½", "👩‍🚀👍🏽🇨🇳 é e\u0301"),
]
LONG_WORD = re.compile(r"\S{65}")
Encode = Callable[[str], list[int]]


def verify(model: LoadedModel, written: Path, dtype: str) -> Iterator[str]:
    """Compare a model with what was written of it; yields a line for each comparison that holds.

    Folders are read by transformers too, where it is installed. Raises CheckpointError for what
    differs by more than rounding to dtype.
    """
    again = load_model(str(written), weights="fp32", device="cpu")
    _compare_weights(model, again, dtype)
    ids = _probed_ids(model)
    ours, theirs = (one.model(ids.to(one.device)).cpu() for one in (model, again))
    if dtype == "q8_0":
        by = _check(_root_mean_square(ours, theirs), EIGHT_BIT, "read back")
    else:
        by = _check(_farthest(ours, theirs), SAME if dtype == "fp32" else HALF, "read back")
    ours_of, theirs_of = (partial(encode_from_start, one.tokenizer) for one in (model, again))
    texts, tokenizer = probe_texts(), model.tokenizer
    if written.is_file() and isinstance(tokenizer, BPETokenizer) and tokenizer.short_words:
        long = [text for text in texts if LONG_WORD.search(text)]
        texts = [text for text in texts if text not in long]
        if list(map(ours_of, long)) != list(map(theirs_of, long)):
            yield "Note: llama.cpp has other tokens for some words of more than 64 characters"
    _compare_tokens(ours_of, theirs_of, texts, "read back")
    yield f"read back: the model's weights, logits within {by:.1g} of their spread, and tokens"
    if written.is_dir():
        yield from _ask_transformers(written, ours_of, ids, theirs)


def _compare_weights(model: LoadedModel, again: LoadedModel, dtype: str) -> None:
    ours, theirs = weights_of(model.model), weights_of(again.model)
    for name, weight in ours.items():
        weight = weight.cpu()
        other = theirs.get(name, torch.zeros_like(weight))
        most = ROUNDING[dtype] * weight.abs().max() + SMALLEST[dtype]
        if weight.shape != other.shape or (weight - other).abs().max() > most:
            raise CheckpointError(f"read back, {name} has other weights than the model.")


def _farthest(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference of logits, in standard deviations of ours."""
    return ((ours - theirs).abs().max() / ours.std()).item()


def _root_mean_square(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The usual difference of logits, in standard deviations of ours."""
    return ((ours - theirs).square().mean().sqrt() / ours.std()).item()


def _check(by: float, most: float, how: str) -> float:
    """A difference of logits; CheckpointError if it is more than `most`."""
    if not by <= most:  # nan is no agreement either
        raise CheckpointError(
            f"{how}, the model's logits differ by {by:.2g} standard deviations; {most} is rounding."
        )
    return by


def _compare_tokens(ours: Encode, theirs: Encode, texts: Iterable[str], how: str) -> None:
    for text in texts:
        if ours(text) != theirs(text):
            raise CheckpointError(f"{how}, the tokenizer has other tokens for {text[:40]!r}.")


def _ask_transformers(
    folder: Path, encode: Encode, ids: torch.Tensor, logits: torch.Tensor
) -> Iterator[str]:
    try:
        import transformers
    except ImportError:
        yield "transformers is not installed: what was written is not compared with it"
        return
    version = f"transformers {transformers.__version__}"
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = _opened_by(version, transformers.AutoModelForCausalLM, folder, local_files_only=True)
    tokenizer = _opened_by(version, transformers.AutoTokenizer, folder, local_files_only=True)
    theirs = model.eval().float()(ids).logits
    by = _check(_farthest(logits, theirs), SAME, f"by {version}")
    _compare_tokens(encode, tokenizer.encode, probe_texts(), f"by {version}")
    yield f"by {version}: the model's logits within {by:.1g} of their spread, and tokens"


def _opened_by(library: str, loader: Any, folder: Path, **options: Any) -> Any:
    """What a library's from_pretrained() makes of a folder; CheckpointError if it can't."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's, on its own calls of transformers
            return loader.from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{library} can't open what was written: {first_line(error)[:200]}"
        ) from error


def verify_adapter(model: LoadedModel, folder: Path, which: str) -> Iterator[str]:
    """Compare the adapter that was written of a run with the run's, by PEFT where it is installed.

    Both add it to the weights that the run began from, unrounded; a line says how far the run's
    own model is from that where it has rounded them. Raises CheckpointError for what differs, and
    if these weights are others now; a line says where they can't be had.
    """
    assert model.path is not None, "the model is a run's"
    ids = _probed_ids(model)
    try:
        ours = adapted(model.path, which)(ids)
    except SettingsError as error:  # without a network, or a library
        yield f"not compared: {first_line(error)}"
        return
    own = model.model(ids.to(model.device)).cpu()
    if (by := _farthest(ours, own)) > SAME:
        yield f"the run rounded the weights it began from: its logits are within {by:.1g} of these"
    try:
        import peft
    except ImportError:
        yield "peft is not installed: what was written is not compared with it"
        return
    version = f"peft {peft.__version__}"
    theirs = _opened_by(version, peft.AutoPeftModelForCausalLM, folder).eval().float()(ids).logits
    # a base's rows beyond the tokens are of none
    by = _check(_farthest(ours, theirs[..., : ours.shape[-1]]), SAME, f"by {version}")
    yield f"by {version}: the adapted model's logits within {by:.1g} of their spread"


def _probed_ids(model: LoadedModel) -> torch.Tensor:
    """Tokens of several scripts, (1, T)."""
    ids = [token for text in probe_texts() for token in model.tokenizer.encode(text)]
    n_tokens = min(PROBED_TOKENS, model.model.config.context_length)
    return torch.tensor([ids[:n_tokens]])


def probe_texts() -> list[str]:
    """N_TEXTS texts: oddities, and characters drawn from one or several scripts, from a seed."""
    draw = random.Random(1)

    def drawn(scripts: list[tuple[str, str]]) -> str:
        first, last = draw.choice(scripts)
        return chr(draw.randint(ord(first), ord(last)))

    texts = [*ODD_TEXTS]
    while len(texts) < N_TEXTS:
        scripts = draw.choice([*([script] for script in SCRIPTS), SCRIPTS])
        words = ("".join(drawn(scripts) for _ in range(draw.randint(1, 9))) for _ in range(6))
        texts.append(" ".join(words))
    return texts
