"""Learning rates, AdamW and Muon, and which precision is chosen."""

import copy
import math
import platform
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import engine.optim
from engine.errors import SettingsError
from engine.optim import (
    FINAL_RATE,
    OPTIMIZERS,
    SCHEDULES,
    Muon,
    Rules,
    Schedule,
    build_adamw,
    build_muon,
    build_optimizer,
    default_learning_rate,
    default_warmup_steps,
    extend_schedule,
    learning_rate_at,
    make_schedule,
    orthogonalize,
    set_learning_rate,
)
from engine.precision import choose_precision, keep_precision
from model import GPTModel
from tests.conftest import HostReads
from tests.letters import CPU, assert_the_same, everything, tiny_model

CUDA = torch.device("cuda", 0)
both_kinds = pytest.mark.parametrize("kind", OPTIMIZERS)


def rates_of(schedule: Schedule, n_steps: int) -> list[float]:
    return [learning_rate_at(step, schedule) for step in range(n_steps)]


@pytest.mark.parametrize(
    ("kind", "shares"),
    [
        # five equal steps up to the peak at warm-up's end; half-way down at 54; the last is 104
        ("cosine", {0: 0.2, 3: 0.8, 4: 1.0, 54: 0.55, 104: 0.1, 105: 0.1, 10**9: 0.1}),
        ("constant", {0: 0.2, 3: 0.8, 4: 1.0, 54: 1.0, 104: 1.0, 105: 1.0, 10**9: 1.0}),
        # twenty equal steps down after 84
        ("wsd", {0: 0.2, 3: 0.8, 4: 1.0, 84: 1.0, 85: 0.955, 94: 0.55, 104: 0.1, 10**9: 0.1}),
    ],
)
def test_learning_rate_at_start_warmups_end_middle_last_and_beyond(kind, shares):
    schedule = make_schedule(kind, peak=2e-3, warmup_steps=4, total_steps=105)
    if kind == "wsd":
        assert schedule.decay_steps == 21  # a fifth, rounded up
        schedule = replace(schedule, decay_steps=20)
    found = {step: learning_rate_at(step, schedule) / 2e-3 for step in shares}
    assert found == pytest.approx(shares, rel=1e-12)


def test_the_share_that_decays_and_the_rate_at_the_end_are_as_set():
    def shares(kind, **settings):
        return rates_of(make_schedule(kind, 2.0, 2, 10, **settings), 12)

    low = {"decay_share": 0.55, "final_rate": 0.0}  # six steps, rounded up
    falling = [1 - (i + 1) / 6 for i in range(6)]
    found = [rate / 2.0 for rate in shares("wsd", **low)]
    assert found == pytest.approx([1 / 3, 2 / 3, 1, 1, *falling, 0, 0])
    # the decay begins after the warm-up at the earliest
    found = [rate / 2.0 for rate in shares("wsd", decay_share=1.0, final_rate=0.5)]
    falling = [1 - 0.5 * (i + 1) / 8 for i in range(8)]
    assert found == pytest.approx([1 / 3, 2 / 3, *falling, 0.5, 0.5])
    assert shares("cosine", **low)[2:] == pytest.approx(
        [1 + math.cos(math.pi * i / 7) for i in range(8)] + [0, 0], abs=1e-12
    )
    assert shares("constant", **low) == shares("constant")


def test_cosine_equals_torchs():
    schedule = Schedule("cosine", peak=0.5, warmup_steps=0, total_steps=40)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=39, eta_min=0.05)
    for rate in rates_of(schedule, 40):
        assert rate == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


few = settings(max_examples=50, derandomize=True, deadline=None, database=None)


@st.composite
def new_plans(draw) -> Schedule:
    total_steps = draw(st.integers(1, 60))
    warmup_steps = draw(st.integers(0, total_steps - 1))
    kind = draw(st.sampled_from(SCHEDULES))
    return make_schedule(kind, draw(st.floats(1e-9, 10)), warmup_steps, total_steps)


@few
@given(new_plans())
def test_learning_rate_rises_in_equal_steps_is_never_zero_and_falls_to_its_floor(schedule):
    rates = rates_of(schedule, schedule.total_steps + 10)
    assert all(0 < rate <= schedule.peak for rate in rates)
    rising, falling = rates[: schedule.warmup_steps], rates[schedule.warmup_steps :]
    steps_up = schedule.warmup_steps + 1
    assert rising == pytest.approx([schedule.peak * n / steps_up for n in range(1, steps_up)])
    assert falling == sorted(falling, reverse=True)
    assert set(rates[schedule.total_steps :]) == {rates[schedule.total_steps - 1]}
    n_stable = falling.count(schedule.peak)
    n_after = schedule.total_steps - schedule.warmup_steps  # 1: the peak is the last step
    ends_low = schedule.kind == "wsd" or (schedule.kind == "cosine" and n_after > 1)
    assert falling[n_after - 1] == pytest.approx((FINAL_RATE if ends_low else 1) * schedule.peak)
    if schedule.kind == "wsd":
        assert n_after - n_stable == schedule.decay_steps
    if schedule.kind != "wsd" or schedule.decay_steps < n_after:
        assert n_stable > 0


@pytest.mark.parametrize(
    ("kind", "done", "moves"),
    [(kind, done, False) for kind in ("cosine", "constant") for done in (0, 60)]
    # the decay of wsd moves to the new end unless a step of it is done
    + [("wsd", 0, True), ("wsd", 48, True), ("wsd", 49, False), ("wsd", 60, False)],
)
def test_a_longer_run_keeps_its_old_rates_and_adds_steps_at_the_last_one(kind, done, moves):
    old = make_schedule(kind, 1.0, 5, 60)  # of wsd steps 0 to 47 are before the decay of 12
    rates = rates_of(old, 60)
    expected = rates + [1.0 if kind == "constant" else FINAL_RATE] * 30
    if moves:
        assert rates[47] == 1.0 > rates[48]
        expected = rates[:48] + [1.0] * 30 + [1 - 0.9 * (i + 1) / 12 for i in range(12)]
    assert rates_of(extend_schedule(old, 90, done), 90) == pytest.approx(expected)
    for shorter in (1, 59, 60):
        assert extend_schedule(old, shorter, 0) == old


@few
@given(new_plans(), st.lists(st.tuples(st.integers(0, 99), st.integers(0, 40)), max_size=4))
def test_however_often_a_run_is_made_longer_done_steps_keep_their_rates(schedule, extensions):
    done, rates = 0, []
    for percent, added in [*extensions, (100, 0)]:
        upto = max(done, schedule.total_steps * percent // 100)
        rates += rates_of(schedule, upto)[done:]
        done = upto
        longer = extend_schedule(schedule, schedule.total_steps + added, done)
        assert rates_of(longer, done) == rates
        assert (longer.peak, longer.warmup_steps) == (schedule.peak, schedule.warmup_steps)
        schedule = longer
    falling = rates[schedule.warmup_steps :]
    assert falling == sorted(falling, reverse=True)
    assert all(rate > 0 for rate in rates)


def test_defaults_fall_with_the_width_and_are_a_tenth_of_the_run():
    assert default_learning_rate(768) == pytest.approx(6e-4)
    assert default_learning_rate(384) == pytest.approx(12e-4)
    assert default_learning_rate(1) == default_learning_rate(64) == pytest.approx(7.2e-3)
    assert default_learning_rate(192, "muon") == pytest.approx(2.5 * default_learning_rate(192))
    totals = (1, 9, 10, 1000, 10**6)
    assert [default_warmup_steps(total) for total in totals] == [0, 0, 1, 100, 100]


LLAMA = {"architecture": "llama", "n_heads": 4, "n_kv_heads": 2, "ff_dim": 12, "qk_norm": True}


def step_with_random_gradients(*pairs: tuple[nn.Module, torch.optim.Optimizer], n_steps=3) -> None:
    """Take the same steps with each module, whose parameters are in one order, by its optimizer."""
    for seed in range(n_steps):
        for module, optimizer in pairs:
            set_gradients(module, seed)
            optimizer.step()


def set_gradients(module: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    for p in module.parameters():
        p.grad = torch.randn_like(p)


@pytest.mark.parametrize("tied", [False, True])
@both_kinds
def test_every_trained_parameter_is_in_exactly_one_group_whose_rate_is_set(kind, tied):
    for config in ({}, {"qkv_bias": True, "positions": "sinusoidal"}, LLAMA):
        model = tiny_model(tie_embeddings=tied, **config)
        model.blocks[0].requires_grad_(False)
        optimizer = build_optimizer(kind, model, 1e-3, 0.1)
        grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
        assert {group["lr"] for group in optimizer.param_groups} == {1e-3}
        set_learning_rate(optimizer, 0.25)
        assert {group["lr"] for group in optimizer.param_groups} == {0.25}


@both_kinds
def test_parameters_outside_the_blocks_matrices_keep_their_share_of_the_rate(kind):
    model = tiny_model(tie_embeddings=False)
    hidden = {id(weight) for weight, _ in model.hidden_matrices()}
    optimizer = build_optimizer(kind, model, 1e-2, 0.1, Rules(embedding_rate=4e-2))
    for rate in (1e-2, 0.5, 0.0):
        for group in optimizer.param_groups:
            of_matrices, *mixed = {id(p) in hidden for p in group["params"]}
            assert group["lr"] == pytest.approx(rate if of_matrices else 4 * rate) and not mixed
        set_learning_rate(optimizer, 0.5 if rate == 1e-2 else 0.0)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_with_every_rule_set_steps_equal_those_of_torchs_adamw(kind):
    ours, theirs = (tiny_model(tie_embeddings=False, qkv_bias=True) for _ in range(2))
    rules = Rules(embedding_rate=4e-2, decay_embeddings=True, beta2=0.7)
    optimizer = build_optimizer(kind, ours, 1e-2, 0.1, rules)
    rates = {"blocks": (1e-2, 0.1), "others": (4e-2, 0.1), "vectors": (4e-2, 0.0)}
    groups = {name: [] for name in rates}
    for name, p in theirs.named_parameters():
        matrix = "blocks" if name.startswith("blocks") else "others"
        groups[matrix if p.dim() == 2 else "vectors"].append(p)
    assert [len(group) for group in groups.values()] == [4, 3, 10]
    torchs = torch.optim.AdamW(
        [
            {"params": groups[name], "lr": rate, "weight_decay": decay}
            for name, (rate, decay) in rates.items()
        ],
        betas=(0.9, 0.7),
        eps=1e-8,
        foreach=False,
    )
    step_with_random_gradients((ours, optimizer), (theirs, torchs))
    compared = 0
    for name, p in ours.named_parameters():
        if kind == "adamw" or not (name.startswith("blocks") and p.dim() == 2):
            torch.testing.assert_close(p, theirs.get_parameter(name), msg=name)
            compared += 1
    assert compared == (17 if kind == "adamw" else 13)


@both_kinds
def test_an_optimizer_works_without_torchs_compiler_whose_import_takes_seconds(kind, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch._dynamo", None)  # its import fails
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    optimizer = build_optimizer(kind, model, 1e-2, 0.1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
    assert not torch.equal(before["head.weight"], model.head.weight)
    assert torch.is_grad_enabled() and isinstance(optimizer, torch.optim.Optimizer)


@pytest.mark.parametrize("with_embeddings", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@both_kinds
def test_only_the_weights_of_linear_layers_decay_and_embeddings_if_asked(
    kind, tied, with_embeddings
):
    model = tiny_model(tie_embeddings=tied, qkv_bias=True)
    rules = Rules(decay_embeddings=with_embeddings)
    optimizer = build_optimizer(kind, model, 0.5, 0.1, rules)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)  # so that decay is all that moves a weight
    optimizer.step()
    linear = ("qkv.weight", "out_proj.weight", "mlp.0.weight", "mlp.2.weight", "head.weight")
    decayed = (*linear, "embedding.weight") if with_embeddings else linear
    for name, p in model.named_parameters():
        factor = 1 - 0.5 * 0.1 if name.endswith(decayed) else 1
        torch.testing.assert_close(p.detach(), before[name] * factor, msg=name)
    assert ("head.weight" in before) != tied  # a tied head goes by the embedding's name


def test_adamw_is_fused_on_the_cpu_and_equals_the_plain_one():
    fused_model, plain_model = tiny_model(), tiny_model()
    fused, plain = (build_adamw(model, 1e-2, 0.1) for model in (fused_model, plain_model))
    assert fused.defaults["fused"] is True
    for group in plain.param_groups:
        group["fused"] = False
    step_with_random_gradients((fused_model, fused), (plain_model, plain))
    torch.testing.assert_close(fused_model.state_dict(), plain_model.state_dict())


SHAPES = [(6, 6), (6, 6), (6, 6), (4, 9), (9, 4), (4, 9)]


def random_matrices(*shapes: tuple[int, int]) -> nn.ParameterList:
    torch.manual_seed(0)
    return nn.ParameterList(torch.randn(shape) for shape in shapes)


def with_muon(
    matrices: nn.ParameterList, dtype: torch.dtype = torch.float32, rows=None
) -> tuple[nn.ParameterList, Muon]:
    """Matrices and Muon over them; rows are those of the matrices merged in each."""
    pairs = [(matrix, rows or matrix.shape[:1]) for matrix in matrices]
    return matrices, Muon(pairs, [], learning_rate=0.1, weight_decay=0.2, dtype=dtype)


def model_and_muon(**settings) -> tuple[GPTModel, Muon]:
    model = tiny_model(**settings)
    return model, build_muon(model, 1e-2, 0.1)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has its own from 2.9 on")
def test_steps_equal_those_of_torchs_muon_in_fp32_and_but_for_rounding_in_bf16(monkeypatch):
    options = {"lr": 0.1, "weight_decay": 0.2, "adjust_lr_fn": "match_rms_adamw"}

    def moved(shapes, dtype):
        ours, theirs = random_matrices(*shapes), random_matrices(*shapes)
        torchs = torch.optim.Muon(theirs.parameters(), **options)
        step_with_random_gradients(with_muon(ours, dtype), (theirs, torchs))
        return zip(ours, theirs, random_matrices(*shapes), strict=True)

    for our, their, start in moved([(32, 32), (32, 32), (16, 64), (64, 16)], torch.bfloat16):
        assert (our - their).norm() < 0.02 * (their - start).norm()
    # torch's iteration always runs in bf16; it is made to run in fp32 here
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    for our, their, start in moved(SHAPES, torch.float32):
        assert not torch.allclose(our, start, atol=0.1)
        torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [(6, 6, 6), (6, 4, 4), (14, 14)], ids=str)
def test_matrices_merged_in_a_weight_move_as_by_themselves(rows):
    apart = random_matrices(*[(n, 6) for n in rows])
    merged, one = (nn.ParameterList([torch.cat([*apart]).detach()]) for _ in range(2))
    pairs = with_muon(apart), with_muon(merged, rows=rows), with_muon(one)
    for _ in range(3):
        merged[0].grad = one[0].grad = torch.randn(sum(rows), 6)
        for p, grad in zip(apart, merged[0].grad.split(rows), strict=True):
            p.grad = grad
        for _, optimizer in pairs:
            optimizer.step()
    torch.testing.assert_close(merged[0], torch.cat([*apart]), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(merged[0], one[0], atol=0.01)


@pytest.fixture
def stacks(monkeypatch):
    """The shape and the type of each stack that is orthogonalized."""
    seen, real = [], engine.optim.orthogonalize

    def noting(stack, dtype):
        seen.append((*stack.shape, dtype))
        return real(stack, dtype)

    monkeypatch.setattr(engine.optim, "orthogonalize", noting)
    return seen


def test_matrices_move_the_same_however_many_are_taken_at_once(monkeypatch, stacks):
    together = random_matrices(*SHAPES)
    step_with_random_gradients(with_muon(together))
    for most, largest in ((71, 1), (72, 2), (10**6, 3)):
        stacks.clear()
        monkeypatch.setattr(engine.optim, "MOST_AT_ONCE", most)
        step_with_random_gradients(with_muon(parts := random_matrices(*SHAPES)))
        counts = [count for count, *_ in stacks]
        assert max(counts) == largest
        assert sum(counts) == 3 * len(SHAPES)  # steps times matrices
        torch.testing.assert_close([*together], [*parts], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 16, 16), (3, 8, 40), (3, 40, 8)], ids=str)
def test_orthogonalized_matrices_keep_their_directions_and_get_values_near_one(shape, dtype):
    torch.manual_seed(0)
    # scales do not matter, and fp16 does not hold these
    matrices = torch.randn(shape) * torch.tensor([1e-6, 1.0, 1e6])[:, None, None]
    found = orthogonalize(matrices, dtype)
    assert (found.dtype, found.shape) == (dtype, shape)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    share = values / matrices.norm(dim=(1, 2))[:, None]
    turned = left.mT @ found.float() @ right.mT  # diagonal where the directions are kept
    new_values = turned.diagonal(dim1=1, dim2=2)
    slack = 1e-4 if dtype == torch.float32 else 0.03
    assert ((new_values > 0.68 - slack) & (new_values < 1.21 + slack))[share > 0.002].all()
    assert (share > 0.002).sum() >= share.numel() - 1
    torch.testing.assert_close(turned, new_values.diag_embed(), rtol=0, atol=3 * slack)


def test_a_stack_is_orthogonalized_one_by_one_on_squares_of_the_shorter_side(monkeypatch):
    torch.manual_seed(0)
    squares, real = set(), torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: squares.add(real(a, b).shape) or real(a, b))
    wide = torch.randn(5, 6, 9)
    wide[3] = 0.0
    for stack in (wide, wide.mT):
        squares.clear()
        found = orthogonalize(stack, torch.float32)
        assert squares == {(5, 6, 6)}
        alone = torch.cat([orthogonalize(matrix[None], torch.float32) for matrix in stack])
        torch.testing.assert_close(found, alone)
        assert not found[3].any()


@pytest.mark.parametrize("config", [{"qkv_bias": True}, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("tied", [False, True])
def test_muon_moves_the_matrices_of_the_blocks_and_nothing_else(tied, config):
    model, optimizer = model_and_muon(tie_embeddings=tied, n_layers=2, **config)
    names = {p: name for name, p in model.named_parameters()}
    muon_group, *others = optimizer.param_groups
    assert all("rows" not in group for group in others)
    pairs = zip(muon_group["params"], muon_group["rows"], strict=True)
    rows = {names[p]: rows for p, rows in pairs}
    expected = {"attention.out_proj": (16,)} | (
        {"attention.qkv": (16, 8, 8), "mlp.gate_up": (12, 12), "mlp.down": (16,)}
        if config is LLAMA
        else {"attention.qkv": (16, 16, 16), "mlp.0": (64,), "mlp.2": (16,)}
    )
    blocks = (0, 1)
    assert rows == {
        f"blocks.{i}.{name}.weight": of for i in blocks for name, of in expected.items()
    }


@pytest.mark.parametrize("fused", [True, False])
def test_parameters_that_are_no_hidden_matrices_move_by_adamw(fused):
    by_adamw, start = tiny_model(tie_embeddings=False), tiny_model(tie_embeddings=False)
    by_muon, muon = model_and_muon(tie_embeddings=False)
    adamw = build_adamw(by_adamw, 1e-2, 0.1)
    for group in muon.param_groups[1:]:
        group["fused"] = fused
    step_with_random_gradients((by_adamw, adamw), (by_muon, muon))
    matrices = {id(weight) for weight, _ in by_muon.hidden_matrices()}
    for name, p in by_muon.named_parameters():
        theirs = by_adamw.get_parameter(name)
        assert not torch.equal(p, start.get_parameter(name)), name
        assert torch.allclose(p, theirs, rtol=1e-5, atol=1e-7) == (id(p) not in matrices), name


def test_muon_moves_a_matrix_about_as_far_as_adamw_does_and_none_without_a_gradient():
    model, before = tiny_model(emb_dim=64), tiny_model(emb_dim=64)
    optimizer = build_muon(model, learning_rate=1e-2, weight_decay=0.0)
    set_gradients(model, 0)
    left_out = {"blocks.0.attention.qkv.weight", "final_norm.weight"}
    for name in left_out:
        model.get_parameter(name).grad = None
    optimizer.step()
    for name, p in model.named_parameters():
        rms = (p - before.get_parameter(name)).square().mean().sqrt().item()
        if name in left_out:
            assert rms == 0 and p not in optimizer.state
        elif p.dim() == 2 and name.startswith("blocks"):
            assert rms == pytest.approx(0.2 * 1e-2, rel=0.2), name
        else:
            assert rms > 0


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_bad_step_of_muon_changes_nothing_and_is_as_if_it_had_not_been(number):
    (model, optimizer), (twin, its_optimizer) = model_and_muon(), model_and_muon()
    for seed in range(3):
        before = everything(model, optimizer)
        set_gradients(model, seed)
        for p in model.parameters():
            p.grad.view(-1)[0] = number
        optimizer.found_inf = torch.tensor(1.0)
        optimizer.step()
        found = everything(model, optimizer)
        assert_the_same({name: found[name] for name in before}, before)
        assert all(not found[name].any() for name in found.keys() - before.keys())
        set_gradients(model, seed)
        optimizer.found_inf = torch.tensor(0.0)
        with HostReads() as reads:
            optimizer.step()
        assert reads.count == 0  # nobody waits for the numbers
        set_gradients(twin, seed)
        its_optimizer.step()
    assert_the_same(everything(model, optimizer), everything(twin, its_optimizer))


@pytest.mark.parametrize("unscaled_before", [True, False])
def test_muon_obeys_a_gradient_scaler(unscaled_before):
    (model, optimizer), (twin, its_optimizer) = model_and_muon(), model_and_muon()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    ids = torch.arange(8).view(1, 8)
    twin(ids).square().mean().backward()
    its_optimizer.step()
    good = everything(twin, its_optimizer)
    for factor in (1.0, float("inf")):
        optimizer.zero_grad()
        scaler.scale(model(ids).square().mean() * factor).backward()
        if unscaled_before:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert_the_same(everything(model, optimizer), good)
    assert scaler.get_scale() == 2.0
    optimizer.zero_grad()
    assert optimizer.step() is None
    loss = optimizer.step(lambda: model(ids).square().mean())  # a closure has gradients
    assert loss.requires_grad and loss.item() > 0


@pytest.fixture
def cpu_has(monkeypatch):
    """Give the processor these instruction sets and no others."""

    def install(*names):
        found = dict.fromkeys(names, True) | {"avx512_f": True}
        missing = {name: False for name in ("avx512_bf16", "amx_bf16") if name not in names}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found | missing, raising=False)

    return install


def product_dtype(precision, device=CPU) -> torch.dtype:
    with precision.autocast():
        return (torch.ones(2, 2, device=device) @ torch.ones(2, 2, device=device)).dtype


def test_auto_takes_bf16_where_the_processor_has_it(cpu_has, monkeypatch):
    for unit in ("avx512_bf16", "amx_bf16"):
        cpu_has(unit)
        precision = choose_precision("auto", CPU)
        assert precision.name == "bf16" and unit in precision.reason
        assert product_dtype(precision) == torch.bfloat16
        assert product_dtype(choose_precision("fp32", CPU)) == torch.float32
    cpu_has()
    assert product_dtype(choose_precision("auto", CPU)) == torch.float32
    forced = choose_precision("bf16", CPU)
    assert "slow here" in forced.reason
    assert product_dtype(forced) == torch.bfloat16
    # older torch is asked by its private names
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    for units in ((True, False), (False, True), (False, False)):
        for name, has in zip(asked, units, strict=True):
            monkeypatch.setattr(torch.cpu, name, lambda has=has: has, raising=False)
        assert choose_precision("auto", CPU).name == ("bf16" if any(units) else "fp32")


def test_muon_iterates_in_bf16_where_the_processor_has_it(cpu_has, stacks):
    for units, dtype in ((["amx_bf16"], torch.bfloat16), ([], torch.float32)):
        cpu_has(*units)
        model, optimizer = model_and_muon()
        set_gradients(model, 0)
        optimizer.step()
        assert stacks[-1][-1] == dtype
        assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.skipif(
    not hasattr(torch.cpu, "get_capabilities") or platform.machine() not in ("x86_64", "AMD64"),
    reason="these are units of x86 processors, as torch 2.12 and newer name them",
)
def test_instruction_sets_are_looked_up_by_names_that_torch_knows():
    assert {"avx512_bf16", "amx_bf16"} <= torch.cpu.get_capabilities().keys()


def test_auto_takes_the_fastest_format_that_a_gpu_has(monkeypatch):
    names = {(6, 1): "fp32", (7, 0): "fp16", (7, 5): "fp16", (8, 0): "bf16", (12, 0): "bf16"}
    for version, name in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, v=version: v)
        assert choose_precision("auto", CUDA).name == name
    for is_newer, name in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(
            torch.backends.mps, "is_macos_or_newer", lambda *v, yes=is_newer: v == (14, 0) and yes
        )
        assert choose_precision("auto", torch.device("mps")).name == name


@pytest.mark.parametrize(
    ("version", "begun_in", "name", "reason"),
    [
        ((8, 0), "bf16", "bf16", "as when this run began"),
        ((8, 0), "fp32", "fp32", "as when this run began"),
        ((7, 5), "bf16", "fp16", "but none for bf16; this run began in bf16"),
        ((8, 0), "fp16", "bf16", "this run began in fp16"),
        ((6, 1), "bf16", "fp32", "this run began in bf16"),
        (None, "bf16", "bf16", "as when this run began, but slow here"),
        (None, "fp16", "fp32", "this run began in fp16"),
    ],
)
def test_a_run_that_goes_on_keeps_its_precision_unless_a_gpu_would_emulate_it(
    cpu_has, monkeypatch, version, begun_in, name, reason
):
    cpu_has()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: version)
    kept = keep_precision(begun_in, CPU if version is None else CUDA)
    assert kept.name == name and reason in kept.reason


def test_fp16_is_for_cuda_alone_and_its_loss_alone_is_scaled(monkeypatch):
    for device in ("cpu", "mps"):
        said = f'"fp16" needs a CUDA GPU, and this run is on {device}.\nSet PRECISION = "auto".'
        with pytest.raises(SettingsError, match=said):
            choose_precision("fp16", torch.device(device))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    for name in ("bf16", "fp32", "fp16"):
        precision = choose_precision(name, torch.device("cuda"))
        assert precision.name == name
        assert precision.scaler().is_enabled() == (name == "fp16")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fp16_on_a_gpu_multiplies_in_fp16():
    assert product_dtype(choose_precision("fp16", CUDA), CUDA) == torch.float16
