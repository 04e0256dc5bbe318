"""The score of a text against a loop over its tokens, and its bytes against the decoded text."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from data import OverlappingWindows, WindowDataset, evaluation_loader, make_loaders, plan_windows
from distributed.parallel import Parallel
from engine.errors import DataError
from engine.precision import Precision
from model import GPTConfig, GPTModel
from tests.texts import CHINESE, ENGLISH
from text.tokenizer import CharTokenizer
from training.learner import Learner

CPU = torch.device("cpu")
FP32 = Precision("fp32", "", "cpu")


@dataclass
class Case:
    """A model of a few letters, the loader of a validation text, and the text's tokens."""

    tokenizer: CharTokenizer
    tokens: list[int]
    model: GPTModel
    loader: torch.utils.data.DataLoader

    def learner(self, **options) -> Learner:
        return Learner(self.model, None, FP32, **options)  # it makes no step


def case_of(text: str, length: int, *, batch_size: int = 2, n_train: int = 40) -> Case:
    # the other characters are bytes: half of one may be the first or the last token
    tokenizer = CharTokenizer("etaonrishl dlu\n，春不")
    tokens = tokenizer.encode(text)
    windows, _ = plan_windows(
        n_train + len(tokens),
        max_length=length,
        stride=None,
        batch_size=batch_size,
        train_ratio=0.5,
        n_train=n_train,
    )
    both = np.array([0] * n_train + tokens, dtype=np.uint16)
    _, loader = make_loaders(both, windows, seed=1, num_workers=0, device=CPU)
    torch.manual_seed(length)
    shape = {"context_length": length, "emb_dim": 8, "n_heads": 2, "n_layers": 1}
    model = GPTModel(GPTConfig(vocab_size=tokenizer.vocab_size, positions="sinusoidal", **shape))
    for weight in model.parameters():  # so that a token's context tells
        weight.data *= 20
    return Case(tokenizer, tokens, model, loader)


@torch.no_grad()
def nats_one_by_one(case: Case, length: int) -> list[float]:
    """The loss of each token but the first, one forward pass a token.

    The context grows to a window, then falls to half of one wherever it would be longer.
    """
    nats, start, half = [], 0, max(1, length // 2)
    for at in range(1, len(case.tokens)):
        if at - start > length:
            start += half
        logits = case.model.eval()(torch.tensor([case.tokens[start:at]]))[0, -1]
        nats.append(-logits.log_softmax(0)[case.tokens[at]].item())
    return nats


@pytest.mark.parametrize(("length", "n_tokens"), [(8, 60), (7, 33), (2, 9), (1, 5), (8, 3), (8, 9)])
def test_a_score_is_the_mean_of_a_loop_over_the_tokens_by_the_bytes_of_their_text(length, n_tokens):
    text = (ENGLISH[:40] + CHINESE)[:n_tokens]
    case = case_of(text, length)
    score = case.learner(micro_batch=2).score(case.loader, case.tokenizer)
    nats = nats_one_by_one(case, length)
    written = b"".join(map(case.tokenizer.token_bytes, case.tokens[1:]))
    assert case.tokenizer.token_bytes(case.tokens[0]) + written == text.encode("utf-8")
    bits = sum(nats) / math.log(2)
    assert score.loss == pytest.approx(sum(nats) / len(nats), rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-4)
    assert score.bits_per_byte == pytest.approx(bits / len(written), rel=1e-5)
    assert score.bits_per_character == pytest.approx(bits / (len(text) - 1), rel=1e-5)
    assert score.n_batches == score.of_batches
    # an evaluation on the way is the same
    assert case.learner(micro_batch=2).evaluate(case.loader, score.of_batches) == score.loss


def test_every_token_is_scored_once_with_at_least_half_a_window_before_it():
    for length, n_tokens, resident in itertools.product((1, 2, 3, 8), range(2, 28), (False, True)):
        given = WindowDataset(np.arange(n_tokens, dtype=np.uint16), length, length)
        if resident:
            given.move_to(CPU)
        windows, scored = OverlappingWindows(given), []
        for number in sorted(range(len(windows)), key=windows.scored):
            ids, targets = (part[0].tolist() for part in windows.__getitems__([number]))
            assert ids == list(range(ids[0], ids[0] + len(ids))) and len(ids) <= length
            assert targets == [i + 1 for i in ids[-len(targets) :]]
            assert (targets[0], targets[-1] + 1) == windows.scored(number)
            assert ids[0] == 0 or len(ids) - len(targets) + 1 >= length / 2
            scored += targets
        assert scored == list(range(1, n_tokens))
        assert len(windows) - windows.n_whole <= 2
    windows = OverlappingWindows(WindowDataset(np.arange(80), 8, 8))
    ids, targets = windows.__getitems__([2, 3, 4])
    assert (ids.shape, targets.shape) == ((3, 8), (3, 4))
    assert [windows.scored(n) for n in (2, 3, 4)] == [(t[0], t[-1] + 1) for t in targets.tolist()]


class Rank(Parallel):
    """One of several ranks whose sums a test adds up."""

    def __init__(self, *place: int, sums=None) -> None:
        super().__init__(*place)
        self.own, self._sums = [], sums

    def sum(self, tensor):
        self.own.append(tensor.double())
        return tensor.clamp(min=1) if self._sums is None else self._sums[len(self.own) - 1]


def test_ranks_micro_batches_and_parts_of_the_text_score_the_same_tokens():
    case = case_of(ENGLISH[:150], 8, batch_size=3)
    for most in (None, 1, 4, 7):
        alone = case.learner(micro_batch=3).score(case.loader, case.tokenizer, most)
        whole = evaluation_loader(case.loader, most, micro_batch=3)
        targets = [token for _, part in whole for token in part.flatten().tolist()]
        text = case.tokenizer.decode(targets)
        assert alone.size.bytes == len(text.encode("utf-8")) / len(targets)
        assert alone.size.characters == len(text) / len(targets)
        assert (alone.n_batches, alone.of_batches) == (most or 14, 14)
        ranks = [Rank(number, 2) for number in range(2)]
        for rank in ranks:  # the first time only what each has is wanted
            case.learner(micro_batch=2, parallel=rank).score(case.loader, case.tokenizer, most)
        sums = [a + b for a, b in zip(*(rank.own for rank in ranks), strict=True)]
        for number in range(2):
            rank = Rank(number, 2, sums=sums)
            found = case.learner(micro_batch=2, parallel=rank)
            found = found.score(case.loader, case.tokenizer, most)
            assert (found.size, found.of_batches) == (alone.size, 14)
            assert found.loss == pytest.approx(alone.loss, rel=1e-5)


@torch.no_grad()
def test_the_loss_on_training_text_is_that_of_its_windows_side_by_side_as_they_are_trained_on():
    """A window that is learnt by heart is not known from its middle on."""
    case = case_of(ENGLISH[:89], 8)
    starts = range(0, len(case.tokens) - 8, 8)
    windows = torch.tensor([case.tokens[start : start + 9] for start in starts])
    expected = case.model(windows[:, :-1], windows[:, 1:]).item()
    learner = case.learner()
    assert learner.evaluate(case.loader, overlapping=False) == pytest.approx(expected, rel=1e-5)
    assert learner.evaluate(case.loader) != pytest.approx(expected, rel=1e-2)


def test_a_text_of_one_token_has_nothing_to_score():
    case = case_of(ENGLISH[:40], 8)
    case.loader.dataset.tokens = case.loader.dataset.tokens[:1]
    with pytest.raises(DataError, match="nothing to evaluate on"):
        case.learner(micro_batch=2).score(case.loader, case.tokenizer)
