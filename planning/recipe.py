"""From a text, a machine and minutes to a recipe: tokenizer, model and training.

Every candidate gets a predicted loss from the law of planning/law.py, by its size and the bytes it
reads in the time; the least wins. Nothing here reads a file, a clock or a device.
"""

import math
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

import numpy as np

from engine.settings import check, setting
from engine.words import AS_SET, Words
from planning.law import (
    COEFFICIENTS,
    Candidates,
    count_heads,
    expected_bits,
    layer_sizes,
    step_costs,
    turning_passes,
)
from text.facts import BPE_SIZES, LEAST_BYTES_A_TOKEN, LEAST_MEASURED, TextFacts

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
TIME_RUNGS = 3  # the times that are looked at lie 2**(1/3) apart
NEAR = 2.0  # a set width or depth has the others of rungs that differ by this factor at most
LEAST_MINUTES, MOST_MINUTES = 0.25, 10_000.0
ENOUGH_SHARE = 0.8  # of the minutes: a run that needs less of them takes less
MEMORY_SHARE = 0.8  # of the memory, the most that a run may need
# bytes for each token, layer and unit of width or of the MLP's width; and of a chunk of logits
WIDTH_BYTES, MLP_BYTES, HEAD_BYTES = 37, 16, 2e7
RATES, ADAMW_RATES, WEIGHT_DECAYS = (1e-3, 2e-2), (5e-5, 5e-3), (0.02, 3)  # within which they stay
MOST_BEST_BYTES = 1 << 28  # of the copy of the best weights in memory; larger ones go to the disk
# checkpoints, where keep_checkpoints is not set; and the most bytes of one for each parameter, as
# storage/checkpoint counts them: weights, two moments and best weights
USUALLY_KEPT, CHECKPOINT_BYTES = 2, 16
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

    bits_per_byte is the forecast on the validation text, low and high its rough range. minutes is
    the part of the time that is worth training. memory and disk are bytes.
    """

    tokenizer: str = setting()
    model: dict[str, Any] = setting()  # GPTConfig's arguments but vocab_size
    training: dict[str, Any] = setting()  # TrainingConfig's arguments that were chosen
    reasons: dict[str, Any] = setting()  # Words by the names of tokenizer, model and training
    runner_up: Words | list[str] | str = setting()  # Words
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
    warnings: list[Any] = setting()  # Words

    def __post_init__(self) -> None:
        check(self)
        # JSON knows no Words
        reasons = {name: Words.of(why) for name, why in self.reasons.items()}
        object.__setattr__(self, "reasons", reasons)
        object.__setattr__(self, "runner_up", Words.of(self.runner_up))
        object.__setattr__(self, "warnings", [Words.of(warning) for warning in self.warnings])

    def keeping(self, n_checkpoints: int) -> "Recipe":
        """The recipe for a run that keeps so many checkpoints."""
        more = min(n_checkpoints, self.steps) - min(USUALLY_KEPT, self.steps)
        return replace(self, disk=self.disk + more * CHECKPOINT_BYTES * self.parameters)


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def in_digits(value: float, digits: int) -> str:
    """A number in so many digits as text, without an exponent: 300,000 or 0.00005."""
    return f"{Decimal(f'{value:.{digits}g}'):,f}"


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


# two cores with fast bf16: the benchmarks' budgets are its minutes, and "auto" chooses for it
REFERENCE, REFERENCE_MINUTES = MachineFacts("cpu", 6e11, 15e-6, 1e-9, 8 * 10**9), 10.0


def choose_tokenizer(text: TextFacts, fixed: Fixed, minutes: float | None) -> str:
    """The TOKENIZER of a recipe around a model that is set, for some minutes of REFERENCE.

    It depends on nothing that may change when a run goes on: not on this machine, nor on epochs.
    """
    roomy = replace(REFERENCE, memory=10**15)
    return choose_recipe(text, roomy, minutes or REFERENCE_MINUTES, fixed).tokenizer


def choose_recipe(text: TextFacts, machine: MachineFacts, minutes: float, fixed: Fixed) -> Recipe:
    """The recipe for a text on a machine in some minutes, around what the user has set.

    More minutes never give a worse forecast: where further passes would only learn the text by
    heart, the recipe takes less time.
    """
    machine = machine.rounded()
    candidates = _find_candidates(text, machine, fixed)
    step_s = _step_seconds(machine, fixed, candidates)
    times = _times(minutes, float(step_s.min()))
    forecast = _predict(text, fixed, candidates, step_s, times)
    bits = forecast.bits
    # the last time is beyond the end: between the two, the loss may fall and rise again
    reached = np.concatenate([bits[:, :-2], bits[:, -2:].max(axis=1, keepdims=True)], axis=1)
    best = reached.min(axis=1)
    tied = np.flatnonzero(best <= best.min() * (1 + TIES))
    chosen = min(
        tied.tolist(), key=lambda i: (candidates.size[i, 0], candidates.context[i, 0], best[i])
    )
    place = int(np.argmin(reached[chosen]))
    if forecast.steps[chosen, -2] < TOO_FEW_STEPS:  # what learns nothing yet needs all the time
        place = len(times) - 2
    used = minutes if place == len(times) - 2 else _minutes_of(float(times[place]))
    own = candidates.some(np.array([chosen]))
    predicted = _predict(text, fixed, own, step_s[[chosen]], times[[place]])
    choice = _Choice(text, machine, fixed, own, predicted)
    return choice.recipe(
        minutes, used, bits=float(best.min()), runner_up=_runner_up(candidates, best, chosen)
    )


def _seconds_of(minutes: float) -> float:
    """The seconds that steps get of a run's minutes."""
    k = COEFFICIENTS
    return max(1.0, k["usable"] * 60 * minutes - k["start_s"])


def _minutes_of(seconds: float) -> float:
    """The minutes of a run whose steps take so many seconds."""
    k = COEFFICIENTS
    return (seconds + k["start_s"]) / k["usable"] / 60


def _times(minutes: float, step_s: float) -> np.ndarray:
    """Seconds of steps from TOO_FEW_STEPS of the fastest model up to those of the minutes, and the
    next ones; the same for all longer minutes."""
    most = _seconds_of(minutes)
    first, last = (TIME_RUNGS * math.log2(s) for s in (TOO_FEW_STEPS * step_s, most))
    first, last = math.ceil(min(first, last)), math.floor(last)
    rungs = [2 ** (k / TIME_RUNGS) for k in range(first, last + 2)]
    return np.array([*(rung for rung in rungs[:-1] if rung < most), most, rungs[-1]])


def _find_candidates(text: TextFacts, machine: MachineFacts, fixed: Fixed) -> Candidates:
    """What may be chosen for a text within the memory and around what is set."""
    rows, names = [], []
    for tokenizer in _tokenizers(text, fixed):
        token_bytes, vocabulary = text.bytes_per_token[tokenizer], text.vocabularies[tokenizer]
        for layers, width in _ladder(fixed):
            for context in _contexts(text, width, token_bytes, fixed):
                for windows in _batches(text, context, token_bytes, fixed):
                    shape = (layers, width, *layer_sizes(width, fixed.model))
                    rows.append((*shape, vocabulary, token_bytes, context, windows))
                    names.append(tokenizer)
    columns = [column[:, None] for column in np.array(rows, dtype=np.float64).T]
    found = Candidates(names, *columns)
    gpt2 = np.array([name == "gpt2" for name in names])[:, None]
    # a vocabulary outweighs no model, and GPT-2's is for large ones
    light = found.vocabulary * found.width <= found.in_blocks
    own = ~gpt2 | (text.unique_bytes >= GPT2_BYTES) & (found.in_blocks >= GPT2_PARAMETERS)
    needed = _memory(found, machine, fixed, np.ones_like(found.windows))
    fits = needed <= MEMORY_SHARE * machine.memory
    for allowed in (light & own & fits, own & fits, fits):
        if allowed.any():
            return found.some(np.flatnonzero(allowed[:, 0]))
    return found.some(np.flatnonzero(found.size[:, 0] == found.size.min()))


def _tokenizers(text: TextFacts, fixed: Fixed) -> list[str]:
    if fixed.tokenizer in text.bytes_per_token:
        return [fixed.tokenizer]
    return list(text.bytes_per_token)


def _ladder(fixed: Fixed) -> list[tuple[int, int]]:
    """The layers and widths that what is set allows; beside a set one those of rungs near it."""
    layers, width = fixed.model.get("n_layers"), fixed.model.get("emb_dim")
    heads = fixed.model.get("n_heads") or fixed.model.get("n_kv_heads") or 1
    step = 2 * heads  # rotary positions turn pairs

    def distance(rung: tuple[int, int]) -> float:
        pairs = zip(rung, (layers, width), strict=True)
        return max((abs(math.log(own / asked)) for own, asked in pairs if asked), default=0.0)

    most = max(math.log(NEAR), min(map(distance, LADDER)))
    rungs = [
        (layers or rung[0], width or max(step, round(rung[1] / step) * step))
        for rung in LADDER
        if distance(rung) <= most + 1e-9
    ]
    return list(dict.fromkeys(rungs))


def _longest_context(text: TextFacts, width: int, token_bytes: float) -> float:
    """The longest sensible context of a model."""
    # attention takes a quarter of a step at most, and both sides of the text hold some windows
    longest = min(max(64, 1.4 * width), CONTEXTS[-1])
    longest = min(longest, max(64, text.val_bytes / token_bytes / 2))
    longest = min(longest, text.train_bytes / token_bytes / 4)
    return min(longest, max(64, 2 * text.document_bytes / token_bytes))


def _contexts(text: TextFacts, width: int, token_bytes: float, fixed: Fixed) -> list[int]:
    """The longest sensible context, and half of it."""
    if asked := fixed.model.get("context_length"):
        return [asked]
    longest = _longest_context(text, width, token_bytes)
    fitting = [length for length in CONTEXTS if length <= longest]
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


def _tables(fixed: Fixed) -> int:
    """The matrices with a row for each token: a head, and embeddings of its own if not tied."""
    return 1 if fixed.model.get("tie_embeddings") in (None, True) else 2


def _memory(c: Candidates, machine: MachineFacts, fixed: Fixed, windows: np.ndarray) -> np.ndarray:
    """About the bytes of training in micro-batches of some windows, as engine/memory counts."""
    tables = _tables(fixed) * c.vocabulary * c.width
    weights = 4 * (c.in_blocks + tables)
    is_adamw = fixed.training.get("optimizer") == "adamw"
    kept = 2 * weights + (8 if is_adamw else 4) * c.in_blocks + 8 * tables
    if machine.device == "cpu":
        kept = kept + weights  # the best weights
    in_block = WIDTH_BYTES * c.width + MLP_BYTES * c.mlp_width
    head = HEAD_BYTES + 8 * c.vocabulary * c.width
    return kept + windows * c.context * c.layers * in_block + head


def _step_seconds(machine: MachineFacts, fixed: Fixed, c: Candidates) -> np.ndarray:
    """The seconds of a step of each candidate, (C, 1)."""
    is_adamw = fixed.training.get("optimizer") == "adamw"
    shape = (c.layers, c.width, c.vocabulary, c.context, c.windows)
    work, tokens, size, layers = step_costs(*shape, in_layer=c.in_layer, is_adamw=is_adamw)
    of_sizes = work / machine.flops + size * machine.parameter_s
    return of_sizes + tokens * machine.token_s + layers * machine.layer_s


def _predict(
    text: TextFacts, fixed: Fixed, c: Candidates, step_s: np.ndarray, times: np.ndarray
) -> _Forecast:
    """The forecast for candidates, whose steps take step_s, (C, 1), after some seconds, (K,)."""
    k = COEFFICIENTS
    is_adamw = fixed.training.get("optimizer") == "adamw"
    steps = times / step_s
    tokens = steps * c.batch
    passes = tokens * c.token_bytes / text.unique_bytes

    dropout = k["dropout"] * np.log2(np.maximum(passes, 1))
    dropout = np.clip(dropout, 0, k["most_dropout"]) * (passes > 1.5)
    if fixed.model.get("drop_rate") is not None:
        dropout = np.full_like(dropout, fixed.model["drop_rate"])
    general = (c.batch / 4096) ** k["rate_batch"] * (450 / steps) ** k["rate_steps"]
    rate = np.clip(k["rate"] * (192 / c.width) ** k["rate_width"] * general, *RATES)
    embedding_rate = np.clip(k["rate"] * general, *RATES)
    if is_adamw:
        rate = embedding_rate = np.clip(k["adamw_rate"] * 192 / c.width * general, *ADAMW_RATES)
    if asked := fixed.training.get("learning_rate"):
        embedding_rate = embedding_rate / rate * asked
        rate = np.full_like(rate, asked)
    # a weight is forgotten over a share of the run (Bergsma et al. 2025), sooner where passes are
    # many
    share = np.clip(k["forget"] * (tokens / c.size) ** -k["forget_power"], 0.2, 1)
    share = share * np.minimum(1, k["forget_passes"] / passes)
    decay = np.clip(1 / (rate * steps * share), *WEIGHT_DECAYS)
    if fixed.training.get("weight_decay") is not None:
        decay = np.full_like(decay, fixed.training["weight_decay"])
    turn = turning_passes(text, c, dropout, decay, is_adamw=is_adamw)
    is_gpt2 = fixed.model.get("architecture") == "gpt2"
    bits = expected_bits(text, c, steps, turn, is_adamw=is_adamw, is_gpt2=is_gpt2)
    return _Forecast(bits, steps, passes, turn, dropout, decay, rate, embedding_rate, step_s)


def _runner_up(c: Candidates, best: np.ndarray, chosen: int) -> Words:
    """The best candidate of another model or tokenizer, with its forecast."""
    own = (c.layers[chosen, 0], c.width[chosen, 0], c.tokenizers[chosen])
    others = [
        i
        for i in np.argsort(best, kind="stable").tolist()
        if (c.layers[i, 0], c.width[i, 0], c.tokenizers[i]) != own
    ]
    if not others:
        return Words("none: every choice is set", "没有：各项都已设定")
    i = others[0]
    shape, name, bits = _shape(c, i), c.tokenizers[i], f"{best[i]:.2f}"
    return Words(f"{shape} with {name}: {bits}", f"{shape}，分词器 {name}：{bits}")


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

    def recipe(self, minutes: float, used: float, *, bits: float, runner_up: Words) -> Recipe:
        """The recipe; used are the minutes that are worth training, bits the forecast."""
        c, steps = self.candidate, self._steps
        step_s = float(self.forecast.step_s[0, 0])
        size, read = float(c.size[0, 0]), steps * float(c.batch[0, 0] * c.token_bytes[0, 0])
        is_usual = all(
            low <= value <= high
            for value, (low, high) in ((size, USUAL_PARAMETERS), (read, USUAL_BYTES))
        )
        spread = COEFFICIENTS["interval"] * (1 if is_usual else 1.5)
        return Recipe(
            tokenizer=c.tokenizers[0],
            model=self._model(),
            training=self._chosen_training(),
            reasons=self._reasons(used),
            runner_up=runner_up,
            bits_per_byte=round(bits, 4),
            low=round(bits * (1 - spread), 4),
            high=round(bits * (1 + spread), 4),
            minutes=used,
            passes=round(self._passes, 3),
            steps=steps,
            tokens_per_s=round(float(c.batch[0, 0]) / step_s, 1),
            by_heart_minute=self._by_heart_minute(),
            parameters=self._n_parameters(),
            memory=self._memory(),
            disk=self._disk(),
            warnings=[
                *find_warnings(self.text, minutes, used),
                *self._about_steps(minutes, used),
                *self._about_memory(),
            ],
        )

    @property
    def _steps(self) -> int:
        return max(1, int(self.forecast.steps[0, 0]))

    @property
    def _passes(self) -> float:
        """Through the text with its repeats, as its reader counts them."""
        passes = float(self.forecast.passes[0, 0])
        return passes * self.text.unique_bytes / max(1, self.text.train_bytes)

    def _n_parameters(self) -> int:
        c = self.candidate
        return int(c.in_blocks[0, 0] + _tables(self.fixed) * (c.vocabulary * c.width)[0, 0])

    def _model(self) -> dict[str, Any]:
        """GPTConfig's arguments but vocab_size."""
        c, fixed = self.candidate, self.fixed.model
        width = int(c.width[0, 0])
        is_llama = fixed.get("architecture", "llama") == "llama"
        own = {
            "architecture": "llama",
            "context_length": int(c.context[0, 0]),
            "emb_dim": width,
            "n_heads": count_heads(width, fixed.get("n_kv_heads") or 1),
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
        c, forecast, steps, k = self.candidate, self.forecast, self._steps, COEFFICIENTS
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
            "warmup_steps": min(max(20, round(k["warmup"] * steps)), steps // 4),
            "decay_share": k["decay_share"],
            "final_rate": k["final_rate"],
            "weight_decay": _rounded(float(forecast.weight_decay[0, 0])),
            "decay_embeddings": bool(forecast.passes[0, 0] > 4),
            "beta2": round(min(0.999, max(0.8, 0.5 ** (1 / half_life))), 4),
            "sampling": "windows",
            "shift_windows": True,
        }

    def _chosen_training(self) -> dict[str, Any]:
        """The values that the user has left open, and that go with the ones that are set."""
        asked = self.fixed.training
        open_ones = {n: value for n, value in self._training().items() if asked.get(n) is None}
        if asked.get("schedule") not in (None, "wsd"):
            del open_ones["decay_share"]
        return open_ones

    def _reasons(self, used: float) -> dict[str, Any]:
        """Why each value is what it is, by name; what is set has no other reason."""
        own = self._reasons_of_model(used) | self._reasons_of_training()
        given = (self.fixed.model, self.fixed.training, {"tokenizer": self.fixed.tokenizer})
        set_names = {
            name for values in given for name, value in values.items() if value is not None
        }
        return {name: AS_SET if name in set_names else why for name, why in own.items()}

    def _reasons_of_model(self, used: float) -> dict[str, Words]:
        c, model, minutes = self.candidate, self._model(), in_digits(used, 3)
        width, passes = int(c.width[0, 0]), in_digits(self._passes, 2)
        token_bytes, rows = float(c.token_bytes[0, 0]), int(c.vocabulary[0, 0])
        head = model.get("head_dim") or width // model["n_heads"]
        context = Words(
            "no longer than the text or its documents allow", "不超过文本或其文档所允许的长度"
        )
        if _longest_context(self.text, width, token_bytes) >= 1.4 * width:
            context = Words(
                "attention takes at most a quarter of a step", "注意力至多占一步的四分之一"
            )
        dropout = Words("too few passes for any", "遍数太少，用不着")
        if model["drop_rate"]:
            dropout = Words(f"for {passes} passes", f"因为读 {passes} 遍")
        return {
            "tokenizer": Words(
                f"{token_bytes:.2f} bytes a token, for a head of {rows:,} rows",
                f"每 token {token_bytes:.2f} 字节，输出层 {rows:,} 行",
            ),
            "n_layers": Words(
                f"what learns most from {minutes} min of this machine",
                f"在本机 {minutes} 分钟内学得最多",
            ),
            "emb_dim": Words(
                f"reads the text {passes} times in that time", f"这段时间内把文本读 {passes} 遍"
            ),
            "n_heads": Words(f"{head} wide each", f"每个头宽 {head}"),
            "context_length": context,
            "drop_rate": dropout,
        }

    def _reasons_of_training(self) -> dict[str, Words]:
        c, k, steps = self.candidate, COEFFICIENTS, self._steps
        is_adamw = self.fixed.training.get("optimizer") == "adamw"
        batch = float(c.batch[0, 0])
        tokens, share = steps * batch, f"{k['warmup']:.0%}"
        each = in_digits(tokens / float(c.size[0, 0]), 2)
        of_width = "^-1" if is_adamw else f"^-{k['rate_width']:g}"
        of_batch, of_steps = f"^{k['rate_batch']:g}", f"^-{k['rate_steps']:g}"
        of_run = Words(
            f"batch{of_batch} and {steps:,} steps{of_steps}",
            f"批次{of_batch} 和 {steps:,} 步{of_steps}",
        )
        rate = Words(f"by width{of_width}, {of_run.en}", f"按宽度{of_width}、{of_run.zh}")
        embedding_rate = rate
        if not is_adamw:
            embedding_rate = Words(
                f"by {of_run.en}: it does not depend on the width", f"按{of_run.zh}：与宽度无关"
            )
        return {
            "batch_size": Words(
                f"{batch:,.0f} tokens a step for {tokens:,.0f} in all",
                f"每步 {batch:,.0f} 个 token，共 {tokens:,.0f} 个",
            ),
            "optimizer": Words("learns more in a step than AdamW", "每一步比 AdamW 学得多"),
            "learning_rate": rate,
            "embedding_rate": embedding_rate,
            "schedule": Words("its end can be moved", "它的终点可以移动"),
            "decay_share": Words(
                "a long fall ends lowest in runs of minutes", "几分钟的运行里，长衰减最终的损失最低"
            ),
            "final_rate": Words("a lower end gains nothing", "更低的终点没有收获"),
            "warmup_steps": Words(f"{share} of the steps, at least 20", f"步数的 {share}，至少 20"),
            "weight_decay": Words(
                f"for {each} tokens a parameter", f"因为每个参数有 {each} 个 token"
            ),
            "decay_embeddings": Words("from 4 passes on", "读满 4 遍时启用"),
            "beta2": Words(
                "forgets half in a tenth of the steps, or in 7 million tokens",
                "在十分之一的步数或 700 万个 token 内忘掉一半",
            ),
            "shift_windows": Words("each pass sees other windows", "每一遍看到不同的窗口"),
        }

    def _by_heart_minute(self) -> float | None:
        """The minute from which the model would learn the text by heart; None if beyond reach."""
        c, forecast = self.candidate, self.forecast
        tokens = float(forecast.turn[0, 0]) * self.text.unique_bytes / float(c.token_bytes[0, 0])
        seconds = tokens / float(c.batch[0, 0]) * float(forecast.step_s[0, 0])
        minute = _minutes_of(seconds)
        return float(f"{minute:.2g}") if minute <= 10 * MOST_MINUTES else None

    def _memory(self) -> int:
        """The bytes of a step, in micro-batches that fit."""
        windows, room = self.candidate.windows.copy(), MEMORY_SHARE * self.machine.memory

        def needed() -> float:
            return float(_memory(self.candidate, self.machine, self.fixed, windows)[0, 0])

        while needed() > room and windows[0, 0] > 1:
            windows = np.ceil(windows / 2)
        return int(needed())

    def _about_steps(self, minutes: float, used: float) -> list[Words]:
        if self._steps >= TOO_FEW_STEPS or used < minutes:
            return []
        step_s = in_digits(float(self.forecast.step_s[0, 0]), 2)
        return [
            Words(
                f"A step of this model takes about {step_s} s, so that {minutes:g} minutes have "
                f"some {self._steps} of them, and a model needs hundreds: set a smaller MODEL, "
                "emb_dim or batch_size, or more MINUTES.",
                f"这个模型一步约需 {step_s} 秒，{minutes:g} 分钟只够约 {self._steps} 步，而模型需要"
                "几百步：请设更小的 MODEL、emb_dim 或 batch_size，或更多的 MINUTES。",
            )
        ]

    def _about_memory(self) -> list[Words]:
        if self._memory() <= self.machine.memory:
            return []
        needed, there = (in_digits(n / 1e9, 2) for n in (self._memory(), self.machine.memory))
        return [
            Words(
                f"Even one window needs some {needed} GB of memory, and there are {there} GB: set "
                "a smaller emb_dim, n_layers or max_length.",
                f"即使只有一个窗口也需要约 {needed} GB 内存，而这里有 {there} GB：请设更小的 "
                "emb_dim、n_layers 或 max_length。",
            )
        ]

    def _disk(self) -> int:
        """The most bytes of the run: the tokens, the checkpoints that are kept, and a new one."""
        c, keep = self.candidate, min(USUALLY_KEPT, self._steps)
        text = self.text.train_bytes + self.text.val_bytes
        width = 2 if c.vocabulary[0, 0] <= 2**16 else 4
        checkpoints = (keep + 1) * CHECKPOINT_BYTES * self._n_parameters()
        return int(checkpoints + width * text / c.token_bytes[0, 0])


def find_warnings(text: TextFacts, minutes: float, used: float) -> list[Words]:
    """What is odd about a text for so many minutes, each with what to do about it."""
    found = _find_text_warnings(text)
    if used < ENOUGH_SHARE * minutes:
        enough, wanted = in_digits(used, 2), f"{max(LEAST_MINUTES, _rounded(used)):g}"
        found.append(
            Words(
                f"After about {enough} minutes the validation loss gains nothing more: "
                f"MINUTES = {wanted} is enough, and more text helps more than more time.",
                f"约 {enough} 分钟之后验证损失不再下降：MINUTES = {wanted} 就够了，增加文本比增加"
                "时间更有用。",
            )
        )
    is_enough = text.train_bytes >= BPE_SIZES[0] * LEAST_BYTES_A_TOKEN
    # a character of a large alphabet is as good as a word
    has_letters = text.distinct_characters <= COEFFICIENTS["whole_from"]
    if not text.can_train and len(text.bytes_per_token) > 1 and is_enough and has_letters:
        found.append(
            Words(
                "A tokenizer made for this text usually learns more in the same time: "
                "pip install tokenizers.",
                "为这份文本专门做的分词器在同样时间里通常学得更多：pip install tokenizers。",
            )
        )
    return found


def is_noise(text: TextFacts) -> bool:
    """Whether the order of a text's bytes tells almost nothing, as far as so much text shows it."""
    is_measured = text.val_bytes >= LEAST_MEASURED or text.train_bytes >= 2 * LEAST_MEASURED
    most = COEFFICIENTS["noise_to"] * text.entropies[0]
    return is_measured and text.entropies[0] > 0 and text.bz2_bits >= most


def _find_text_warnings(text: TextFacts) -> list[Words]:
    """What is odd about a text, whatever the time."""
    n_bytes, found = text.train_bytes + text.val_bytes, []
    if n_bytes < SMALL_TEXT:
        found.append(
            Words(
                f"{n_bytes:,} bytes are very little: the model learns them by heart and not the "
                'language. Name more text: DATA = ["one.txt", "two.txt"].',
                f"{n_bytes:,} 字节太少：模型会把它背下来，而学不到语言。请给出更多文本："
                'DATA = ["one.txt", "two.txt"]。',
            )
        )
    if text.leaked > 0.05:
        found.append(
            Words(
                f"{text.leaked:.0%} of the validation text is in the training text word for word: "
                'its loss will look too good. Name another: DATA = {"path": ..., "val": '
                '"other.txt"}.',
                f"验证文本有 {text.leaked:.0%} 逐字出现在训练文本中：它的损失会显得太好。请另选："
                'DATA = {"path": ..., "val": "other.txt"}。',
            )
        )
    if text.repeated > MOST_REPEATED:
        unique = max(1, text.unique_bytes)
        found.append(
            Words(
                f"{text.repeated:.0%} of the training text repeats what came before: it teaches "
                f"as much as {unique:,} bytes. Remove the copies from DATA.",
                f"训练文本有 {text.repeated:.0%} 重复了前面的内容：它只相当于 {unique:,} 字节的"
                "文本。请从 DATA 中删去重复的部分。",
            )
        )
    entropy = text.entropies[0]
    if is_noise(text):
        found.append(
            Words(
                "The order of its bytes tells almost nothing (bz2 needs "
                f"{text.bz2_bits:.2f} bits a byte, their frequencies {entropy:.2f}): no model can "
                "learn more. Is DATA the text that you mean, in the right encoding: "
                'DATA = {"path": ..., "encoding": ...}?',
                f"字节的顺序几乎不含信息（bz2 每字节需要 {text.bz2_bits:.2f} 比特，字节频率 "
                f"{entropy:.2f}）：模型学不到更多。DATA 是你想要的文本吗，编码对吗："
                'DATA = {"path": ..., "encoding": ...}？',
            )
        )
    return found
