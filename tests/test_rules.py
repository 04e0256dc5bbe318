"""The rules of training that settings change reach the run, which resumes exactly with them."""

import pytest

import environment
from engine.optim import learning_rate_at, make_schedule
from tests.resuming import PARAMS, STEPS, Bench, compare, of_steps, rows_of, uninterrupted

RULES = {
    "optimizer": "muon",
    "embedding_rate": 2e-2,
    "schedule": "wsd",
    "decay_share": 0.5,
    "final_rate": 0.05,
    "beta2": 0.8,
    "weight_decay": 2.0,
    "decay_embeddings": True,
    "shift_windows": True,
}


@pytest.fixture
def bench(workdir, monkeypatch) -> Bench:
    return Bench(workdir, monkeypatch)


def test_a_run_with_rules_of_its_own_follows_them_and_resumes_exactly(bench):
    bench.describe("run", **RULES)
    bench.signal_at("take_step", 3, 9)  # in the first and in the second epoch
    compare(bench.finish(), uninterrupted(bench, **RULES))
    assert bench.stopped_at == [3, 9]
    rates = [row["train/lr"] for row in of_steps(rows_of(bench.run))]
    schedule = make_schedule("wsd", 1e-2, 4, STEPS, decay_share=0.5, final_rate=0.05)
    assert rates == pytest.approx([learning_rate_at(step, schedule) for step in range(STEPS)])
    of_blocks, decayed, others = bench.env.optimizer.param_groups
    assert of_blocks["lr"] == pytest.approx(5e-4) and of_blocks["weight_decay"] == 2.0
    model = bench.env.model
    layers = (model.token_embedding, model.position_embedding, model.head)
    assert {*map(id, decayed["params"])} == {id(layer.weight) for layer in layers}
    assert (decayed["weight_decay"], others["weight_decay"]) == (2.0, 0.0)
    for group in (decayed, others):
        assert group["lr"] == pytest.approx(2 * 5e-4)
        assert group["betas"] == (0.9, 0.8)
    batches = bench.env.train_loader.batch_sampler
    starts = []
    for epoch in range(2):
        batches.start_at(epoch)
        starts.append(sorted(start for batch in batches for start in batch))
    assert [start % PARAMS["max_length"] for start in starts[0]] == [0] * 28
    assert starts[1] == [start + batches.offset(1) for start in starts[0]] != starts[0]


def test_windows_that_begin_anywhere_are_not_shifted_too(bench):
    bench.describe("run", sampling="random", shift_windows=True)
    batches = environment.prepare_environment("settings.py").train_loader.batch_sampler
    assert batches.n_steps == 8  # for 29 windows of 16 in 469 tokens; shifted ones would be 28
    assert batches.count_windows(7) == 4
