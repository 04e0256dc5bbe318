"""From a text, a machine and minutes to a recipe: tokenizer, model and training.

Every candidate gets a predicted loss from a law of its size and of the bytes it reads in the time;
the least wins. The law is bounded by the entropies of the text and by what can be learnt (after
"Practical scaling laws in a data-constrained world", arXiv 2605.09189), repeated bytes count less
(Muennighoff et al. 2023). Nothing here reads a file, a clock or a device.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np

from engine.settings import check, setting
from text.facts import TextFacts

# Starting values, set by hand after a few known runs; python -m benchmarks.recipe fits them to
# more. docs/recipes.md says what each one means.
COEFFICIENTS = {
    "size": 22.2,  # h = size N^-size_power + bytes T^-bytes_power + heart ...
    "size_power": 0.35,
    "bytes": 112.0,
    "bytes_power": 0.55,
    "token_share": 0.41,  # a byte counts (bytes a token) ^ -token_share
    "repeats": 4.3,  # passes after which further ones add 1/e of a first one
    "heart": 0.02,
    "heart_power": 0.35,
    "turn": 31.5,  # passes after which a model with a parameter a byte learns the text by heart
    "turn_muon": 0.2,  # with Muon so much sooner
    "turn_power": 0.5,
    "turn_dropout": 10.0,
    "turn_decay": 0.5,
    "entropy": 0.7,  # the share of bz2's bits that no training removes
    "wide": 0.129,  # less of them for each further byte of a character
    "noise_from": 0.65,  # bz2's share of the byte entropy from where less can be learnt,
    "noise_to": 0.95,  # and where nothing can
    "batch": 2048.0,  # tokens, the best batch of a run of 1.5 million
    "batch_power": 0.4,
    "batch_loss": 0.00375,  # of a batch off by a factor of 2; four times that for 4
    "steps": 250.0,  # fewer cost few_steps for each halving, squared
    "few_steps": 0.02,
    "thin": 0.5,  # tokens a parameter, below which each halving costs thin_loss, squared
    "thin_loss": 0.004,
    "rare": 400.0,  # mean uses of a token in the text below which each halving costs rare_loss
    "rare_loss": 0.006,
    "context": 0.01,  # the loss of a context of 256 bytes, falling with its length
    "context_power": 1.0,
    "adamw": 0.5,  # what a byte counts with AdamW, and in GPT-2's architecture
    "gpt2": 0.7,
    "interval": 0.08,  # half of the likely range, a guess; half as much again beyond USUAL_*
    "usable": 0.9,  # the share of the time that steps get, but for the start
    "start_s": 11.0,  # two cores: imports, timed steps, the last samples and the end of Python
}
USUAL_PARAMETERS, USUAL_BYTES = (3e5, 1.2e7), (5e4, 5e7)  # of models, and read by them
# layers and width, by size; each at most about twice the one before
LADDER = (
    *((1, 32), (2, 64), (3, 96), (4, 128), (4, 192), (6, 192), (5, 256), (6, 320), (6, 384)),
    *((8, 448), (8, 512), (10, 640), (12, 768), (14, 896), (16, 1024), (20, 1280), (24, 1536)),
    *((24, 2048), (32, 2560)),
)
GPT2_BYTES, GPT2_PARAMETERS = 50_000_000, 10_000_000  # from where GPT-2's vocabulary is a candidate
CONTEXTS = (8, 16, 32, 64, 128, 256, 512, 1024)
BATCHES = tuple(2**power for power in range(8, 20))  # tokens
TIES = 0.003  # what is as good goes to the smaller model
TIME_RUNGS = 4  # the minutes that are looked at lie 2**(1/4) apart
LEAST_MINUTES, MOST_MINUTES = 0.25, 10_000.0
ENOUGH_SHARE = 0.8  # of the minutes: a run that needs less of them takes less
MEMORY_SHARE = 0.8  # of the memory, the most that a run may need
# bytes for each token, layer and unit of width; and of a chunk of logits
BLOCK_BYTES, HEAD_BYTES = 80, 2e7
MOST_REPEATED = 0.3  # of the training text, without a warning
TOO_FEW_STEPS = 50  # in which no model learns much
SMALL_TEXT = 20_000  # bytes, below which a forecast means little
DIGITS = 2  # of the machine's figures, and of the chosen rates


@dataclass(frozen=True)
class MachineFacts:
    """How fast a device trains and what it holds; each figure is rounded before it is used."""

    device: str = setting()  # "cpu", "cuda", "mps" or "xpu"
    flops: float = setting(above=0)  # floating point operations a second of large products
    token_s: float = setting(minimum=0)  # seconds that a token takes besides, whatever the model
    parameter_s: float = setting(minimum=0)  # seconds a parameter in each optimizer step
    memory: int = setting(minimum=1)  # bytes
    layer_s: float = setting(0.0, minimum=0)  # seconds a layer in each step, however few tokens

    def __post_init__(self) -> None:
        check(self)

    def rounded(self) -> "MachineFacts":
        """These facts to DIGITS digits, so that equal machines get equal recipes."""
        values = (self.flops, self.token_s, self.parameter_s)
        flops, token_s, parameter_s = map(_rounded, values)
        memory, layer_s = int(_rounded(self.memory)), _rounded(self.layer_s)
        return MachineFacts(self.device, flops, token_s, parameter_s, memory, layer_s)


@dataclass(frozen=True)
class Fixed:
    """What the user has set: TOKENIZER, fields of GPTConfig and fields of TrainingConfig."""

    tokenizer: str | None
    model: dict[str, Any]
    training: dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """What to train and how, with the reasons and what is expected of it.

    bits_per_byte is the forecast on the validation text, low and high its likely range. minutes is
    the part of the time that is worth training. memory and disk are bytes.
    """

    tokenizer: str = setting()
    model: dict[str, Any] = setting()  # GPTConfig's arguments but vocab_size
    training: dict[str, Any] = setting()  # TrainingConfig's arguments that were chosen
    reasons: dict[str, Any] = setting()  # by the names of tokenizer, model and training
    runner_up: str = setting()
    bits_per_byte: float = setting(minimum=0)
    low: float = setting(minimum=0)
    high: float = setting(minimum=0)
    minutes: float = setting(above=0)
    passes: float = setting(minimum=0)
    steps: int = setting(minimum=1)
    tokens_per_s: float = setting(above=0)
    by_heart_minute: float | None = setting(minimum=0)  # None: never in practice
    parameters: int = setting(minimum=1)
    memory: int = setting(minimum=0)
    disk: int = setting(minimum=0)
    warnings: list[Any] = setting()

    def __post_init__(self) -> None:
        check(self)


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def in_digits(value: float, digits: int) -> str:
    """A number in so many digits as text, without an exponent: 300,000 or 0.00005."""
    return f"{Decimal(f'{value:.{digits}g}'):,f}"


@dataclass(frozen=True)
class Candidates:
    """Models with their tokenizers and batches.

    Each array has a value a candidate, (C, 1) float64, so that they meet times of (K,).
    """

    tokenizers: list[str]
    layers: np.ndarray
    width: np.ndarray
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
        return self.layers * (4 * self.width**2 + 3 * self.width * _mlp_width(self.width))

    @property
    def size(self) -> np.ndarray:
        """N of the law: the parameters in products, the head's among them."""
        return self.in_blocks + self.vocabulary * self.width

    def some(self, kept: np.ndarray) -> "Candidates":
        """Those at some indices."""
        _, *arrays = vars(self).values()
        return Candidates([self.tokenizers[i] for i in kept], *(array[kept] for array in arrays))


@dataclass(frozen=True)
class _Forecast:
    """What is predicted for candidates at times, (C, K) each but step_s, which is (C, 1)."""

    bits: np.ndarray  # a byte
    steps: np.ndarray
    passes: np.ndarray  # through the text without its repeats
    turn: np.ndarray  # passes from which the model learns the text by heart
    dropout: np.ndarray
    weight_decay: np.ndarray
    rate: np.ndarray  # of matrices
    embedding_rate: np.ndarray
    step_s: np.ndarray


def choose_recipe(text: TextFacts, machine: MachineFacts, minutes: float, fixed: Fixed) -> Recipe:
    """The recipe for a text on a machine in some minutes, around what the user has set.

    More minutes never give a worse forecast: where further passes would only learn the text by
    heart, the recipe takes less time.
    """
    machine = machine.rounded()
    times = _times(minutes)
    candidates = _find_candidates(text, machine, fixed)
    forecast = _predict(text, machine, fixed, candidates, times)
    bits = forecast.bits
    # the last time is beyond the end: between the two, the loss may fall and rise again
    reached = np.concatenate([bits[:, :-2], bits[:, -2:].max(axis=1, keepdims=True)], axis=1)
    best = reached.min(axis=1)
    tied = np.flatnonzero(best <= best.min() * (1 + TIES))
    chosen = min(
        tied.tolist(), key=lambda i: (candidates.size[i, 0], candidates.context[i, 0], best[i])
    )
    time = float(times[np.argmin(reached[chosen])])
    if forecast.steps[chosen, -2] < TOO_FEW_STEPS:  # what learns nothing yet needs all the time
        time = minutes
    own = candidates.some(np.array([chosen]))
    choice = _Choice(text, machine, fixed, own, _predict(text, machine, fixed, own, [time]))
    return choice.recipe(
        minutes, time, bits=float(best.min()), runner_up=_runner_up(candidates, best, chosen)
    )


def _times(minutes: float) -> np.ndarray:
    """Times up to the minutes, these, and the next one; the same for all longer minutes."""
    n_rungs = math.floor(TIME_RUNGS * math.log2(max(minutes, LEAST_MINUTES) / LEAST_MINUTES))
    rungs = [LEAST_MINUTES * 2 ** (k / TIME_RUNGS) for k in range(n_rungs + 2)]
    return np.array([*(rung for rung in rungs[:-1] if rung < minutes), minutes, rungs[-1]])


def _mlp_width(width: Any) -> Any:
    """ff_dim of the llama architecture's default."""
    return -(-8 * width // 192) * 64


def _find_candidates(text: TextFacts, machine: MachineFacts, fixed: Fixed) -> Candidates:
    """What may be chosen for a text within the memory and around what is set."""
    rows, names = [], []
    for tokenizer in _tokenizers(text, fixed):
        token_bytes, vocabulary = text.bytes_per_token[tokenizer], text.vocabularies[tokenizer]
        for layers, width in _ladder(fixed):
            for context in _contexts(text, width, token_bytes, fixed):
                for windows in _batches(text, context, token_bytes, fixed):
                    rows.append((layers, width, vocabulary, token_bytes, context, windows))
                    names.append(tokenizer)
    columns = [column[:, None] for column in np.array(rows, dtype=np.float64).T]
    found = Candidates(names, *columns)
    gpt2 = np.array([name == "gpt2" for name in names])[:, None]
    # a vocabulary outweighs no model, and GPT-2's is for large ones
    sound = found.vocabulary * found.width <= found.in_blocks
    sound &= ~gpt2 | (text.unique_bytes >= GPT2_BYTES) & (found.in_blocks >= GPT2_PARAMETERS)
    fits = _memory(found, machine, np.ones_like(found.windows)) <= MEMORY_SHARE * machine.memory
    for allowed in (sound & fits, fits):
        if allowed.any():
            return found.some(np.flatnonzero(allowed[:, 0]))
    return found.some(np.flatnonzero(found.size[:, 0] == found.size.min()))


def _tokenizers(text: TextFacts, fixed: Fixed) -> list[str]:
    if fixed.tokenizer in text.bytes_per_token:
        return [fixed.tokenizer]
    return list(text.bytes_per_token)


def _ladder(fixed: Fixed) -> list[tuple[int, int]]:
    """The layers and widths that what is set allows."""
    layers, width = fixed.model.get("n_layers"), fixed.model.get("emb_dim")
    heads = fixed.model.get("n_heads") or fixed.model.get("n_kv_heads") or 1
    step = 2 * heads  # rotary positions turn pairs
    rungs = [
        (layers or rung[0], width or max(step, round(rung[1] / step) * step)) for rung in LADDER
    ]
    return list(dict.fromkeys(rungs))


def _contexts(text: TextFacts, width: int, token_bytes: float, fixed: Fixed) -> list[int]:
    """The longest sensible context, and half of it."""
    if asked := fixed.model.get("context_length"):
        return [asked]
    # attention takes a quarter of a step at most, and both sides of the text hold two windows
    longest = min(max(64, 1.4 * width), CONTEXTS[-1])
    longest = min(longest, text.val_bytes / token_bytes / 2, text.train_bytes / token_bytes / 4)
    documents = max(64, 2 * text.document_bytes / token_bytes)
    fitting = [length for length in CONTEXTS if length <= min(longest, documents)]
    return fitting[-2:] if fitting and fitting[-1] >= 128 else fitting[-1:] or [CONTEXTS[0]]


def _batches(text: TextFacts, context: int, token_bytes: float, fixed: Fixed) -> list[int]:
    """The windows of a step."""
    accumulated = fixed.training.get("gradient_accumulation_steps") or 1
    if asked := fixed.training.get("batch_size"):
        return [asked * accumulated]
    most = max(1, int(text.train_bytes / token_bytes) // context)  # no more than the text has
    windows = [max(1, tokens // context) for tokens in BATCHES]
    fitting = {-(-min(n, most) // accumulated) * accumulated for n in windows}
    return sorted(fitting)


def _memory(c: Candidates, machine: MachineFacts, windows: np.ndarray) -> np.ndarray:
    """About the bytes of training in micro-batches of some windows, as engine/memory counts."""
    weights, blocks = 4 * c.size, c.in_blocks
    kept = 2 * weights + 4 * blocks + 8 * (c.size - blocks)
    if machine.device == "cpu":
        kept = kept + weights  # the best weights
    activations = windows * c.context * c.layers * BLOCK_BYTES * c.width
    head = HEAD_BYTES + 8 * c.vocabulary * c.width
    return kept + activations + head


def step_costs(
    layers: Any, width: Any, vocabulary: Any, context: Any, windows: Any, *, is_adamw: bool = False
) -> tuple[Any, Any, Any, Any]:
    """What an optimizer step is made of: operations, tokens, parameters and layers.

    Of numbers or arrays; windows are those of the step. Muon's operations are those of its
    Newton-Schulz iterations.
    """
    in_blocks = layers * (4 * width**2 + 3 * width * _mlp_width(width))
    size, tokens = in_blocks + vocabulary * width, windows * context
    work = tokens * (6 * size + 12 * layers * width * context)
    return work + (0 if is_adamw else 24 * width * in_blocks), tokens, size, layers


def _predict(
    text: TextFacts, machine: MachineFacts, fixed: Fixed, c: Candidates, times: Any
) -> _Forecast:
    """The forecast for candidates after some minutes, (K,)."""
    k = COEFFICIENTS
    is_adamw = fixed.training.get("optimizer") == "adamw"
    seconds = np.maximum(1.0, k["usable"] * 60 * np.asarray(times) - k["start_s"])
    costs = step_costs(c.layers, c.width, c.vocabulary, c.context, c.windows, is_adamw=is_adamw)
    step_s = (
        costs[0] / machine.flops
        + costs[1] * machine.token_s
        + costs[2] * machine.parameter_s
        + costs[3] * machine.layer_s
    )
    steps = seconds / step_s
    unique, tokens = text.unique_bytes, steps * c.batch
    passes = tokens * c.token_bytes / unique

    dropout = np.clip(0.05 * np.log2(np.maximum(passes, 1)), 0, 0.2) * (passes > 1.5)
    if fixed.model.get("drop_rate") is not None:
        dropout = np.full_like(dropout, fixed.model["drop_rate"])
    general = (c.batch / 4096) ** 0.5 * (450 / steps) ** 0.3
    rate = np.clip(6e-3 * (192 / c.width) ** 0.5 * general, 1e-3, 2e-2)
    embedding_rate = np.clip(6e-3 * general, 1e-3, 2e-2)
    if is_adamw:
        rate = embedding_rate = np.clip(1.5e-3 * 192 / c.width * general, 5e-5, 5e-3)
    if asked := fixed.training.get("learning_rate"):
        embedding_rate = embedding_rate / rate * asked
        rate = np.full_like(rate, asked)
    # a weight is forgotten over a share tau of the run (Bergsma et al. 2025), sooner where passes
    # are many
    tau = np.clip(1.08 * (tokens / c.size) ** -0.53, 0.2, 1) * np.minimum(1, 4 / passes)
    decay = np.clip(1 / (rate * steps * tau), 0.02, 3)
    if fixed.training.get("weight_decay") is not None:
        decay = np.full_like(decay, fixed.training["weight_decay"])
    turn = turning_passes(text, c, dropout, decay, is_adamw=is_adamw)
    is_gpt2 = fixed.model.get("architecture") == "gpt2"
    bits = expected_bits(text, c, steps, turn, is_adamw=is_adamw, is_gpt2=is_gpt2)
    return _Forecast(bits, steps, passes, turn, dropout, decay, rate, embedding_rate, step_s)


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
    losses = losses + k["context"] * (256 / (c.context * c.token_bytes)) ** k["context_power"]
    # where there is little to learn, little can be lost
    learnable = min(1.0, 2 * (1 - floor / entropy)) if entropy else 0.0
    return np.where(steps < 1, 16.0, bits * (1 + losses * learnable))


def _floor(text: TextFacts, k: Mapping[str, float]) -> float:
    """The bits a byte that no training removes; for noise the entropy of its bytes."""
    entropy = text.entropies[0]
    narrow = max(0.5, 1 - k["wide"] * (text.bytes_per_character - 1))
    share = (text.bz2_bits / entropy if entropy else 1) - k["noise_from"]
    noise = min(1.0, max(0.0, share / (k["noise_to"] - k["noise_from"])))
    part = k["entropy"] * narrow
    return float(min(entropy, text.bz2_bits * (part + (1 - part) * noise)))


def _runner_up(c: Candidates, best: np.ndarray, chosen: int) -> str:
    """The best candidate of another model or tokenizer, with its forecast."""
    own = (c.layers[chosen, 0], c.width[chosen, 0], c.tokenizers[chosen])
    others = [
        i
        for i in np.argsort(best, kind="stable").tolist()
        if (c.layers[i, 0], c.width[i, 0], c.tokenizers[i]) != own
    ]
    if not others:
        return "none: every choice is set"
    i = others[0]
    return f"{_shape(c, i)} with {c.tokenizers[i]}: {best[i]:.2f}"


def _shape(c: Candidates, i: int = 0) -> str:
    return f"{c.layers[i, 0]:.0f} x {c.width[i, 0]:.0f}"


@dataclass(frozen=True)
class _Choice:
    """The chosen candidate and its forecast at the chosen time, as arrays of one value."""

    text: TextFacts
    machine: MachineFacts
    fixed: Fixed
    candidate: Candidates
    forecast: _Forecast

    def recipe(self, minutes: float, used: float, *, bits: float, runner_up: str) -> Recipe:
        """The recipe; used are the minutes that are worth training, bits the forecast."""
        c, steps = self.candidate, self._steps
        passes = float(self.forecast.passes[0, 0])
        step_s = float(self.forecast.step_s[0, 0])
        size, read = float(c.size[0, 0]), steps * float(c.batch[0, 0] * c.token_bytes[0, 0])
        is_usual = all(
            low <= value <= high
            for value, (low, high) in ((size, USUAL_PARAMETERS), (read, USUAL_BYTES))
        )
        spread = COEFFICIENTS["interval"] * (1 if is_usual else 1.5)
        by_heart = self._by_heart_minute()
        return Recipe(
            tokenizer=c.tokenizers[0],
            model=self._model(),
            training={
                name: value
                for name, value in self._training().items()
                if self.fixed.training.get(name) is None
            },
            reasons=self._reasons(used),
            runner_up=runner_up,
            bits_per_byte=round(bits, 4),
            low=round(bits * (1 - spread), 4),
            high=round(bits * (1 + spread), 4),
            minutes=used,
            passes=round(passes * self.text.unique_bytes / max(1, self.text.train_bytes), 3),
            steps=steps,
            tokens_per_s=round(float(c.batch[0, 0]) / step_s, 1),
            by_heart_minute=by_heart,
            parameters=int(size),
            memory=self._memory(),
            disk=self._disk(),
            warnings=[
                *find_warnings(self.text, minutes, used),
                *self._about_steps(minutes),
                *self._about_memory(),
            ],
        )

    @property
    def _steps(self) -> int:
        return max(1, int(self.forecast.steps[0, 0]))

    def _model(self) -> dict[str, Any]:
        """GPTConfig's arguments but vocab_size."""
        c, fixed = self.candidate, self.fixed.model
        width = int(c.width[0, 0])
        is_llama = fixed.get("architecture", "llama") == "llama"
        own = {
            "architecture": "llama",
            "context_length": int(c.context[0, 0]),
            "emb_dim": width,
            "n_heads": _heads(width, fixed.get("n_kv_heads") or 1),
            "n_layers": int(c.layers[0, 0]),
            "drop_rate": round(float(self.forecast.dropout[0, 0]), 2),
            "qkv_bias": False,
            "qk_norm": is_llama,
            "zero_init": True,
            "tie_embeddings": True,
        }
        return (
            own
            | {name: value for name, value in fixed.items() if value is not None}
            | {"context_length": int(c.context[0, 0])}
        )

    def _training(self) -> dict[str, Any]:
        """TrainingConfig's arguments, those that the user has set among them."""
        c, forecast, steps = self.candidate, self.forecast, self._steps
        accumulated = self.fixed.training.get("gradient_accumulation_steps") or 1
        batch = float(c.batch[0, 0])
        # Adam's memory of squares is a share of the run and a number of tokens (Marek et al. 2025)
        half_life = max(1.0, min(steps / 10, 7e6 / batch))
        return {
            "batch_size": max(1, int(c.windows[0, 0]) // accumulated),
            "gradient_accumulation_steps": accumulated,
            "optimizer": "muon",
            "learning_rate": _rounded(float(forecast.rate[0, 0])),
            "embedding_rate": _rounded(float(forecast.embedding_rate[0, 0])),
            "schedule": "wsd",
            "warmup_steps": min(max(20, round(0.03 * steps)), steps // 4),
            "decay_share": 0.55,
            "final_rate": 0.03,
            "weight_decay": _rounded(float(forecast.weight_decay[0, 0])),
            "decay_embeddings": bool(forecast.passes[0, 0] > 4),
            "beta2": round(min(0.999, max(0.8, 0.5 ** (1 / half_life))), 4),
            "sampling": "windows",
            "shift_windows": True,
        }

    def _reasons(self, used: float) -> dict[str, Any]:
        """Why each value is what it is, by name; what is set has no other reason."""
        c, forecast = self.candidate, self.forecast
        passes, tokens = float(forecast.passes[0, 0]), self._steps * float(c.batch[0, 0])
        width, dropout = int(c.width[0, 0]), float(forecast.dropout[0, 0])
        own = {
            "tokenizer": f"{float(c.token_bytes[0, 0]):.2f} bytes a token, for a head of "
            f"{int(c.vocabulary[0, 0]):,} rows",
            "n_layers": f"what learns most from {in_digits(used, 3)} min of this machine",
            "emb_dim": f"reads the text {in_digits(passes, 2)} times in that time",
            "n_heads": f"{width // self._model()['n_heads']} wide each",
            "context_length": "attention takes at most a quarter of a step",
            "drop_rate": "no byte is read twice"
            if not dropout
            else f"for {in_digits(passes, 2)} passes",
            "batch_size": f"{float(c.batch[0, 0]):,.0f} tokens a step for {tokens:,.0f} in all",
            "optimizer": "learns more in a step than AdamW",
            "learning_rate": f"by width^-1/2, batch^1/2 and {self._steps:,} steps^-0.3",
            "embedding_rate": "that of width 192: it does not depend on the width",
            "schedule": "its end can be moved",
            "decay_share": "a long decay ends lowest",
            "final_rate": "a low end gains most",
            "warmup_steps": "3 % of the steps, at least 20",
            "weight_decay": f"for {in_digits(tokens / float(c.size[0, 0]), 2)} tokens a parameter",
            "decay_embeddings": "from 4 passes on",
            "beta2": "forgets half in a tenth of the steps, or in 7 million tokens",
            "shift_windows": "each pass sees other windows",
        }
        given = (self.fixed.model, self.fixed.training, {"tokenizer": self.fixed.tokenizer})
        set_names = {
            name for values in given for name, value in values.items() if value is not None
        }
        return {name: "as set" if name in set_names else why for name, why in own.items()}

    def _by_heart_minute(self) -> float | None:
        """The minute from which the model would learn the text by heart; None if beyond reach."""
        c, forecast, k = self.candidate, self.forecast, COEFFICIENTS
        tokens = float(forecast.turn[0, 0]) * self.text.unique_bytes / float(c.token_bytes[0, 0])
        seconds = tokens / float(c.batch[0, 0]) * float(forecast.step_s[0, 0])
        minute = (seconds + k["start_s"]) / k["usable"] / 60
        return float(f"{minute:.2g}") if minute <= 10 * MOST_MINUTES else None

    def _memory(self) -> int:
        """The bytes of a step, in micro-batches that fit."""
        windows, room = self.candidate.windows.copy(), MEMORY_SHARE * self.machine.memory
        while _memory(self.candidate, self.machine, windows)[0, 0] > room and windows[0, 0] > 1:
            windows = np.ceil(windows / 2)
        return int(_memory(self.candidate, self.machine, windows)[0, 0])

    def _about_steps(self, minutes: float) -> list[str]:
        if self._steps >= TOO_FEW_STEPS:
            return []
        step_s = float(self.forecast.step_s[0, 0])
        return [
            f"A step of this model takes about {in_digits(step_s, 2)} s, so that {minutes:g} "
            f"minutes have some {self._steps} of them, and a model needs hundreds: set a smaller "
            "MODEL, emb_dim or batch_size, or more MINUTES."
        ]

    def _about_memory(self) -> list[str]:
        if self._memory() <= self.machine.memory:
            return []
        needed, there = (in_digits(n / 1e9, 2) for n in (self._memory(), self.machine.memory))
        return [
            f"Even one window needs some {needed} GB of memory, and there are {there} GB: "
            "set a smaller emb_dim, n_layers or max_length."
        ]

    def _disk(self) -> int:
        """The bytes of the run: three checkpoints at most, the best weights, the tokens."""
        c = self.candidate
        blocks, others = float(c.in_blocks[0, 0]), float((c.vocabulary * c.width)[0, 0])
        checkpoint = 8 * blocks + 12 * others
        text = self.text.train_bytes + self.text.val_bytes
        width = 2 if c.vocabulary[0, 0] <= 2**16 else 4
        return int(3 * checkpoint + 4 * (blocks + others) + width * text / c.token_bytes[0, 0])


def _heads(width: int, kv_heads: int = 1) -> int:
    """The heads of a width: 64 wide each, 32 below 128; else the next that divides it.

    Their number is a multiple of kv_heads.
    """
    wanted = 32 if width < 128 else 64
    sizes = [size for size in range(2, width + 1, 2) if width % (size * kv_heads) == 0]
    if not sizes:  # GPTConfig says what is wrong with more than one
        return kv_heads
    return width // min(sizes, key=lambda size: (abs(size - wanted), size))


def find_warnings(text: TextFacts, minutes: float, used: float) -> list[str]:
    """What is odd about a text for so many minutes, each with what to do about it."""
    n_bytes, found = text.train_bytes + text.val_bytes, []
    if n_bytes < SMALL_TEXT:
        found.append(
            f"{n_bytes:,} bytes are very little: the model learns them by heart and not the "
            'language. Name more text: DATA = ["one.txt", "two.txt"].'
        )
    if text.leaked > 0.05:
        found.append(
            f"{text.leaked:.0%} of the validation text is in the training text word for word: its "
            'loss will look too good. Name another: DATA = {"path": ..., "val": "other.txt"}.'
        )
    if text.repeated > MOST_REPEATED:
        found.append(
            f"{text.repeated:.0%} of the training text repeats what came before: it teaches as "
            f"much as {max(1, text.unique_bytes):,} bytes. Remove the copies from DATA."
        )
    k, entropy = COEFFICIENTS, text.entropies[0]
    if entropy and text.bz2_bits >= k["noise_to"] * entropy:
        found.append(
            f"The order of its bytes tells almost nothing (bz2 needs {text.bz2_bits:.2f} bits a "
            f"byte, their frequencies {entropy:.2f}): no model can learn more. Is DATA the text "
            'that you mean, in the right encoding: DATA = {"path": ..., "encoding": ...}?'
        )
    if used < ENOUGH_SHARE * minutes:
        found.append(
            f"After about {in_digits(used, 2)} minutes the validation loss gains nothing more: "
            f"MINUTES = {max(LEAST_MINUTES, _rounded(used)):g} is enough, and more text helps "
            "more than more time."
        )
    if not text.can_train and len(text.bytes_per_token) > 1:
        found.append(
            "A tokenizer made for this text usually learns more in the same time: "
            "pip install tokenizers."
        )
    return found
