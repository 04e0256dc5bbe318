"""The law by which a recipe is chosen: the loss of a model of some size after some reading.

It is bounded by the entropies of the text and by what can be learnt (after "Practical scaling laws
in a data-constrained world", arXiv 2605.09189); repeated bytes count less (Muennighoff et al.
2023). docs/recipes.md writes it out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from text.facts import TextFacts

NO_STEP = 16.0  # bits a byte, a forecast where the time is too short for a single step
# Those of FITTED in benchmarks/recipe.py, "entropy" and "interval" are what python -m
# benchmarks.recipe fits to its runs; the others are set by hand. docs/recipes.md says what each
# one means.
COEFFICIENTS = {
    "size": 22.5,  # h = size N^-size_power + bytes T^-bytes_power + heart ...
    "size_power": 0.416,
    "bytes": 52.3,
    "bytes_power": 0.412,
    "token_share": 0.214,  # a byte counts (bytes a token) ^ -token_share
    "repeats": 3.24,  # passes after which further ones add 1/e of a first one
    "heart": 0.0282,
    "heart_power": 0.35,
    "turn": 31.5,  # passes after which a model with a parameter a byte learns the text by heart
    "turn_muon": 0.356,  # with Muon so much sooner
    "turn_power": 0.5,
    "turn_dropout": 5.0,
    "turn_decay": 0.25,
    "entropy": 0.717,  # the share of bz2's bits that no training removes
    "wide": 0.129,  # less of them for each further byte of a character
    "noise_from": 0.65,  # bz2's share of the byte entropy from where less can be learnt,
    "noise_to": 0.95,  # and where nothing can
    "batch": 2048.0,  # tokens, the best batch of a run of 1.5 million
    "batch_power": 0.4,
    "batch_loss": 0.00443,  # of a batch off by a factor of 2; four times that for 4
    "steps": 250.0,  # fewer cost few_steps for each halving, squared
    "few_steps": 0.00467,
    "thin": 0.5,  # tokens a parameter, below which each halving costs thin_loss, squared
    "thin_loss": 0.00071,
    "rare": 400.0,  # mean uses of a token in the text below which each halving costs rare_loss
    "rare_loss": 0.00415,
    "split_loss": 0.0553,  # of tokens half as long as split_from characters, unless these are
    "split_from": 1.35,
    "whole_from": 1000.0,  # those of an alphabet with more than so many
    "strings": 1.0,  # what is gained by tokens longer than of prose, times the excess's logarithm,
    "growth": 0.19,  # where prose's are longer than those of bpe:512 by this in a doubling of the
    "growth_power": 0.78,  # vocabulary, times doublings ^ growth_power
    "context": 0.0123,  # the loss of a context of 256 bytes, falling with its length
    "context_power": 1.0,
    "adamw": 0.5,  # what a byte counts with AdamW, and in GPT-2's architecture
    "gpt2": 0.7,
    "rate": 6e-3,  # of Muon's matrices 192 wide, with 4,096 tokens a step in a run of 450 steps
    "rate_width": 0.5,  # it falls with width ^ rate_width; that of embeddings does not
    "rate_batch": 0.5,  # and grows with batch ^ rate_batch,
    "rate_steps": 0.3,  # and falls with steps ^ rate_steps
    "adamw_rate": 1.5e-3,  # the same of AdamW, but by 1 / width for all
    "dropout": 0.05,  # for each doubling of the passes
    "most_dropout": 0.2,
    "forget": 1.08,  # the share of the run in which a weight decays by 1 - 1/e, at a token a
    "forget_power": 0.53,  # parameter; it falls with their number ^ forget_power
    "forget_passes": 4.0,  # more passes shorten it in proportion
    "warmup": 0.03,  # of the steps
    "decay_share": 0.55,  # of the steps, in which the rates fall,
    "final_rate": 0.1,  # and to what share
    "interval": 0.103,  # half of the rough range: 80 % of the runs that a fit has not seen
    "usable": 0.9,  # the share of the time that steps get, but for the start
    "start_s": 11.0,  # two cores: imports, timed steps, the last samples and the end of Python
}


@dataclass(frozen=True)
class Candidates:
    """Models with their tokenizers and batches.

    Each array has a value a candidate, (C, 1) float64, so that they meet times of (K,).
    """

    tokenizers: list[str]
    layers: np.ndarray
    width: np.ndarray
    in_layer: np.ndarray  # the parameters of a block's matrices
    mlp_width: np.ndarray
    vocabulary: np.ndarray
    token_bytes: np.ndarray
    context: np.ndarray
    windows: np.ndarray  # a step

    @property
    def batch(self) -> np.ndarray:
        """Tokens a step."""
        return self.windows * self.context

    @property
    def in_blocks(self) -> np.ndarray:
        """The parameters of the blocks' matrices."""
        return self.layers * self.in_layer

    @property
    def size(self) -> np.ndarray:
        """N of the law: the parameters in products, the head's among them."""
        return self.in_blocks + self.vocabulary * self.width

    def some(self, kept: np.ndarray) -> "Candidates":
        """Those at some indices."""
        _, *arrays = vars(self).values()
        return Candidates([self.tokenizers[i] for i in kept], *(array[kept] for array in arrays))


def count_heads(width: int, kv_heads: int = 1) -> int:
    """The heads of a width: 64 wide each, 32 below 128; else the next that divides it.

    Their number is a multiple of kv_heads.
    """
    wanted = 32 if width < 128 else 64
    sizes = [size for size in range(2, width + 1, 2) if width % (size * kv_heads) == 0]
    if not sizes:  # GPTConfig says what is wrong with more than one
        return kv_heads
    return width // min(sizes, key=lambda size: (abs(size - wanted), size))


def layer_sizes(width: int, model: Mapping[str, Any]) -> tuple[float, float]:
    """The parameters of a block's matrices and the width of its MLP, around GPTConfig's fields that
    are set; the others have the values that GPTConfig gives them."""
    kv_heads = model.get("n_kv_heads")
    n_heads = model.get("n_heads") or count_heads(width, kv_heads or 1)
    head_dim = model.get("head_dim") or width / n_heads
    attention = 2 * width * head_dim * (n_heads + (kv_heads or n_heads))
    is_gpt2 = model.get("architecture") == "gpt2"
    mlp_width = model.get("ff_dim") or (4 * width if is_gpt2 else -(-8 * width // 192) * 64)
    return attention + (2 if is_gpt2 else 3) * width * mlp_width, float(mlp_width)


def step_costs(
    layers: Any,
    width: Any,
    vocabulary: Any,
    context: Any,
    windows: Any,
    *,
    in_layer: Any,
    is_adamw: bool = False,
) -> tuple[Any, Any, Any, Any]:
    """What an optimizer step is made of: operations, tokens, parameters and layers.

    Of numbers or arrays; windows are those of the step, in_layer the parameters of a block's
    matrices. Muon's operations are those of its Newton-Schulz iterations.
    """
    in_blocks = layers * in_layer
    size, tokens = in_blocks + vocabulary * width, windows * context
    work = tokens * (6 * size + 12 * layers * width * context)
    return work + (0 if is_adamw else 24 * width * in_blocks), tokens, size, layers


def turning_passes(
    text: TextFacts,
    c: Candidates,
    dropout: np.ndarray,
    weight_decay: np.ndarray,
    *,
    is_adamw: bool = False,
    k: Mapping[str, float] = COEFFICIENTS,
) -> np.ndarray:
    """The passes through a text from which candidates learn it by heart, (C, K)."""
    strength = 1 + k["turn_decay"] * np.log2(np.maximum(weight_decay, 1e-3) / 0.1)
    general = k["turn"] * (1 if is_adamw else k["turn_muon"])
    turn = general * (text.unique_bytes / c.size) ** k["turn_power"]
    return turn * (1 + k["turn_dropout"] * dropout) * np.maximum(0.5, strength)


def expected_bits(
    text: TextFacts,
    c: Candidates,
    steps: np.ndarray,
    turn: np.ndarray,
    *,
    is_adamw: bool = False,
    is_gpt2: bool = False,
    k: Mapping[str, float] = COEFFICIENTS,
) -> np.ndarray:
    """The law: the validation loss of candidates after some steps, (C, K), in bits a byte."""
    unique = text.unique_bytes
    passes = steps * c.batch * c.token_bytes / unique
    again = k["repeats"] * (1 - np.exp(-np.maximum(0, passes - 1) / k["repeats"]))
    read = unique * (np.minimum(passes, 1) + again) * c.token_bytes ** -k["token_share"]
    read = read * (k["adamw"] if is_adamw else 1) * (k["gpt2"] if is_gpt2 else 1)
    heart = k["heart"] * (c.size / unique) ** k["heart_power"] * np.maximum(0, passes / turn - 0.5)
    h = k["size"] * c.size ** -k["size_power"] + k["bytes"] * read ** -k["bytes_power"] + heart

    entropy, floor = text.entropies[0], _floor(text, k)
    bits = floor + (entropy - floor) * h / (1 + h)
    best_batch = k["batch"] * (steps * c.batch / 1.5e6) ** k["batch_power"]
    losses = k["batch_loss"] * np.log2(c.batch / best_batch) ** 2
    losses = losses + k["few_steps"] * np.maximum(0, np.log2(k["steps"] / steps)) ** 2
    thin = np.maximum(0, np.log2(k["thin"] * c.size / (steps * c.batch)))
    losses = losses + k["thin_loss"] * thin**2
    uses = unique / c.token_bytes / c.vocabulary
    losses = losses + k["rare_loss"] * np.maximum(0, np.log2(k["rare"] / uses))
    losses = losses + k["split_loss"] * _split(text, c, k)
    bits = bits * np.exp(-k["strings"] * _excess(text, c, k))
    losses = losses + k["context"] * (256 / (c.context * c.token_bytes)) ** k["context_power"]
    # where there is little to learn, little can be lost
    learnable = min(1.0, 2 * (1 - floor / entropy)) if entropy else 0.0
    bits = np.minimum(bits * (1 + losses * learnable), max(entropy, floor))
    # what validation text shares with training text is soon known by heart
    known = text.leaked * (1 - np.exp(-steps / k["steps"]))
    return np.where(steps < 1, NO_STEP, bits - known * (bits - floor))


def _split(text: TextFacts, c: Candidates, k: Mapping[str, float]) -> np.ndarray:
    """How far candidates' tokens are from holding whole characters, (C, 1), in halvings of their
    length; a character of a large alphabet is as good as a word."""
    is_large = text.distinct_characters > k["whole_from"]
    is_whole = np.array([[is_large and name == "char"] for name in c.tokenizers])
    length = k["split_from"] * text.bytes_per_character / c.token_bytes
    return np.where(is_whole, 0.0, np.maximum(0, np.log2(length)))


def _excess(text: TextFacts, c: Candidates, k: Mapping[str, float]) -> np.ndarray:
    """How much longer candidates' tokens are than those of prose, (C, 1), as a logarithm: where
    long strings come often, as in code, a larger vocabulary holds them whole."""
    if "bpe:512" not in text.bytes_per_token:
        return np.zeros_like(c.token_bytes)
    # what tokens gain that hold whole characters is in split_loss
    usual = max(text.bytes_per_token["bpe:512"], k["split_from"] * text.bytes_per_character)
    doublings = np.maximum(0, np.log2(c.vocabulary / 512))
    growth = np.log(c.token_bytes / usual) - k["growth"] * doublings ** k["growth_power"]
    return np.maximum(0, growth)


def _floor(text: TextFacts, k: Mapping[str, float]) -> float:
    """The bits a byte that no training removes; for noise the entropy of its bytes."""
    entropy = text.entropies[0]
    narrow = max(0.5, 1 - k["wide"] * (text.bytes_per_character - 1))
    share = (text.bz2_bits / entropy if entropy else 1) - k["noise_from"]
    noise = min(1.0, max(0.0, share / (k["noise_to"] - k["noise_from"])))
    part = k["entropy"] * narrow
    return float(min(entropy, text.bz2_bits * (part + (1 - part) * noise)))
