"""Learning rates, AdamW's groups, and which precision is chosen."""

import platform
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import SettingsError
from engine.optim import (
    FLOOR,
    SCHEDULES,
    Schedule,
    build_adamw,
    default_learning_rate,
    default_warmup_steps,
    extend_schedule,
    learning_rate_at,
    make_schedule,
    set_learning_rate,
)
from engine.precision import choose_precision
from model import GPTConfig, GPTModel

CPU = torch.device("cpu")

# ---------------------------------------------------------------------------- learning rates


@pytest.mark.parametrize(
    ("step", "cosine", "constant"),
    [
        (0, 0.2, 0.2),  # the first of five equal steps up
        (3, 0.8, 0.8),
        (4, 1.0, 1.0),  # warm-up's end: the peak
        (54, 0.55, 1.0),  # half-way between the peak and its tenth
        (104, 0.1, 1.0),  # the last step
        (105, 0.1, 1.0),
        (10**9, 0.1, 1.0),
    ],
)
def test_learning_rate_at_start_warmups_end_middle_last_and_beyond(step, cosine, constant):
    for kind, expected in (("cosine", cosine), ("constant", constant)):
        schedule = Schedule(kind, peak=2e-3, warmup_steps=4, total_steps=105)
        assert learning_rate_at(step, schedule) == pytest.approx(2e-3 * expected, rel=1e-12)


def test_cosine_equals_torchs():
    schedule = Schedule("cosine", peak=0.5, warmup_steps=0, total_steps=40)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=39, eta_min=0.05)
    for step in range(40):
        assert learning_rate_at(step, schedule) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize(
    ("step", "share"),
    [
        (0, 0.2),  # the first of five equal steps up
        (3, 0.8),
        (4, 1.0),  # warm-up's end: the peak
        (50, 1.0),
        (84, 1.0),  # the last stable one: twenty are left after it
        (85, 0.955),  # the first of the decay's twenty equal steps down
        (94, 0.55),
        (104, 0.1),  # the last step
        (105, 0.1),
        (10**9, 0.1),
    ],
)
def test_wsd_rises_stays_and_falls_in_a_line_over_the_last_fifth(step, share):
    schedule = make_schedule("wsd", peak=2e-3, warmup_steps=4, total_steps=105)
    assert schedule.decay_steps == 21  # a fifth, rounded up
    schedule = replace(schedule, decay_steps=20)
    assert learning_rate_at(step, schedule) == pytest.approx(2e-3 * share, rel=1e-12)


def planned_rates(schedule: Schedule) -> list[float]:
    return [learning_rate_at(step, schedule) for step in range(schedule.total_steps)]


@pytest.mark.parametrize(
    ("kind", "warmup_steps", "total_steps", "shares"),
    [
        ("constant", 0, 1, [1.0]),
        ("cosine", 0, 1, [1.0]),
        ("cosine", 0, 2, [1.0, 0.1]),
        ("cosine", 0, 3, [1.0, 0.55, 0.1]),
        ("cosine", 2, 3, [1 / 3, 2 / 3, 1.0]),  # the peak is the last step
        ("wsd", 0, 1, [0.1]),
        ("wsd", 0, 2, [1.0, 0.1]),
        ("wsd", 0, 3, [1.0, 1.0, 0.1]),
        ("wsd", 2, 3, [1 / 3, 2 / 3, 0.1]),
        ("wsd", 1, 6, [0.5, 1.0, 1.0, 1.0, 0.55, 0.1]),
        ("wsd", 5, 6, [1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 0.1]),
    ],
)
def test_a_plan_of_few_steps_has_these_rates(kind, warmup_steps, total_steps, shares):
    schedule = make_schedule(kind, 1.0, warmup_steps, total_steps)
    assert planned_rates(schedule) == pytest.approx(shares)


@st.composite
def new_plans(draw) -> Schedule:
    total_steps = draw(st.integers(1, 300))
    warmup_steps = draw(st.integers(0, total_steps - 1))
    kind = draw(st.sampled_from(SCHEDULES))
    return make_schedule(kind, draw(st.floats(1e-9, 10)), warmup_steps, total_steps)


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(new_plans())
def test_learning_rate_is_never_zero_and_never_rises_after_warmup(schedule):
    rates = [learning_rate_at(step, schedule) for step in range(schedule.total_steps + 10)]
    assert all(0 < rate <= schedule.peak for rate in rates)
    rising, falling = rates[: schedule.warmup_steps], rates[schedule.warmup_steps :]
    assert rising == sorted(set(rising))
    assert falling == sorted(falling, reverse=True)
    if (
        schedule.kind != "wsd"
        or schedule.decay_steps < schedule.total_steps - schedule.warmup_steps
    ):
        assert falling[0] == schedule.peak
    if schedule.kind == "wsd":
        assert falling[-1] == pytest.approx(FLOOR * schedule.peak)
        stable = [step for step, rate in enumerate(rates) if rate == schedule.peak]
        n_decayed = schedule.total_steps - schedule.warmup_steps - len(stable)
        assert n_decayed == schedule.decay_steps


# ----------------------------------------------------- a run that is to be longer than planned


@pytest.mark.parametrize("kind", ["cosine", "constant"])
@pytest.mark.parametrize("done", [0, 30, 60])
def test_a_longer_run_keeps_its_old_rates_and_adds_steps_at_the_last_one(kind, done):
    old = make_schedule(kind, 1.0, 5, 60)
    longer = [learning_rate_at(s, extend_schedule(old, 90, done)) for s in range(90)]
    assert longer == planned_rates(old) + [FLOOR if kind == "cosine" else 1.0] * 30


@pytest.mark.parametrize(("done", "moves"), [(0, True), (48, True), (49, False), (60, False)])
def test_the_decay_of_wsd_moves_to_the_new_end_unless_a_step_of_it_is_done(done, moves):
    old = make_schedule("wsd", 1.0, 5, 60)  # steps 0 to 47 are before the decay of 12
    assert planned_rates(old)[47] == 1.0 > planned_rates(old)[48]
    longer = [learning_rate_at(s, extend_schedule(old, 90, done)) for s in range(90)]
    if moves:
        down = [1 - 0.9 * (i + 1) / 12 for i in range(12)]
        expected = planned_rates(old)[:48] + [1.0] * 30 + down
    else:
        expected = planned_rates(old) + [FLOOR] * 30
    assert longer == pytest.approx(expected)


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(new_plans(), st.lists(st.tuples(st.integers(0, 99), st.integers(0, 40)), max_size=4))
def test_however_often_a_run_is_made_longer_done_steps_keep_their_rates(schedule, extensions):
    done, rates = 0, []
    for percent, added in [*extensions, (100, 0)]:
        upto = max(done, schedule.total_steps * percent // 100)
        rates += [learning_rate_at(step, schedule) for step in range(done, upto)]
        done = upto
        longer = extend_schedule(schedule, schedule.total_steps + added, done)
        assert [learning_rate_at(step, longer) for step in range(done)] == rates
        assert (longer.peak, longer.warmup_steps) == (schedule.peak, schedule.warmup_steps)
        schedule = longer
    falling = rates[schedule.warmup_steps :]
    assert falling == sorted(falling, reverse=True)
    assert all(rate > 0 for rate in rates)


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("total_steps", [1, 59, 60])
def test_a_plan_is_never_made_shorter(kind, total_steps):
    schedule = make_schedule(kind, 1.0, 5, 60)
    assert extend_schedule(schedule, total_steps, 0) == schedule


def test_default_learning_rate_falls_with_the_width():
    assert default_learning_rate(768) == pytest.approx(6e-4)
    assert default_learning_rate(384) == pytest.approx(12e-4)
    assert default_learning_rate(1) == default_learning_rate(64) == pytest.approx(7.2e-3)


@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (9, 0), (10, 1), (1000, 100), (10**6, 100)])
def test_default_warmup_is_a_tenth_of_the_run_and_at_most_100(total, warmup):
    assert default_warmup_steps(total) == warmup


# --------------------------------------------------------------------------------------- AdamW


def tiny_model(**settings) -> GPTModel:
    torch.manual_seed(0)
    config = {"vocab_size": 20, "context_length": 8, "emb_dim": 8, "n_heads": 2, "n_layers": 2}
    return GPTModel(GPTConfig(**config | settings))


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_is_in_exactly_one_group(tied, qkv_bias, positions):
    model = tiny_model(tie_embeddings=tied, qkv_bias=qkv_bias, positions=positions)
    groups = build_adamw(model, 1e-3, 0.1).param_groups
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_only_the_weights_of_linear_layers_decay(tied):
    model = tiny_model(tie_embeddings=tied, qkv_bias=True)
    optimizer = build_adamw(model, learning_rate=0.5, weight_decay=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)  # so that decay is all that moves a weight
    optimizer.step()
    linear = ("qkv.weight", "out_proj.weight", "mlp.0.weight", "mlp.2.weight", "head.weight")
    for name, p in model.named_parameters():
        factor = 1 - 0.5 * 0.1 if name.endswith(linear) else 1
        torch.testing.assert_close(p.detach(), before[name] * factor, msg=name)
    assert ("head.weight" in before) != tied  # a tied head goes by the embedding's name


def test_frozen_parameters_are_left_out():
    model = tiny_model()
    model.blocks[0].requires_grad_(False)
    grouped = {id(p) for g in build_adamw(model, 1e-3, 0.1).param_groups for p in g["params"]}
    assert grouped == {id(p) for p in model.parameters() if p.requires_grad}


def test_adamw_is_fused_on_the_cpu_and_equals_the_plain_one():
    fused_model, plain_model = tiny_model(), tiny_model()
    fused = build_adamw(fused_model, 1e-2, 0.1)
    assert fused.defaults["fused"] is True
    plain = build_adamw(plain_model, 1e-2, 0.1)
    for group in plain.param_groups:
        group["fused"] = False
    ids = torch.arange(8).view(1, 8)
    for model, optimizer in ((fused_model, fused), (plain_model, plain)):
        for _ in range(3):
            optimizer.zero_grad()
            model(ids).square().mean().backward()
            optimizer.step()
    for ours, theirs in zip(fused_model.parameters(), plain_model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_learning_rate_is_set_in_every_group():
    optimizer = build_adamw(tiny_model(), 1e-3, 0.1)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


# ----------------------------------------------------------------------------------- precision


@pytest.fixture
def cpu_has(monkeypatch):
    """Give the processor these instruction sets and no others."""

    def install(*names):
        found = dict.fromkeys(names, True) | {"avx512_f": True}
        missing = {name: False for name in ("avx512_bf16", "amx_bf16") if name not in names}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found | missing, raising=False)

    return install


def product_dtype(precision) -> torch.dtype:
    with precision.autocast():
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


@pytest.mark.parametrize("unit", ["avx512_bf16", "amx_bf16"])
def test_auto_takes_bf16_where_the_processor_has_it(cpu_has, unit):
    cpu_has(unit)
    precision = choose_precision("auto", CPU)
    assert precision.name == "bf16"
    assert unit in precision.reason
    assert product_dtype(precision) == torch.bfloat16
    assert product_dtype(choose_precision("fp32", CPU)) == torch.float32


def test_auto_takes_fp32_where_the_processor_has_no_bf16(cpu_has):
    cpu_has()
    precision = choose_precision("auto", CPU)
    assert precision.name == "fp32"
    assert product_dtype(precision) == torch.float32
    forced = choose_precision("bf16", CPU)
    assert "slow here" in forced.reason
    assert product_dtype(forced) == torch.bfloat16


@pytest.mark.parametrize(
    ("avx512", "amx", "name"),
    [(True, False, "bf16"), (False, True, "bf16"), (False, False, "fp32")],
)
def test_older_torch_is_asked_by_its_private_names(monkeypatch, avx512, amx, name):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    assert choose_precision("auto", CPU).name == name


@pytest.mark.skipif(
    not hasattr(torch.cpu, "get_capabilities") or platform.machine() not in ("x86_64", "AMD64"),
    reason="these are units of x86 processors, as torch 2.12 and newer name them",
)
def test_instruction_sets_are_looked_up_by_names_that_torch_knows():
    assert {"avx512_bf16", "amx_bf16"} <= torch.cpu.get_capabilities().keys()


@pytest.mark.parametrize(
    ("capability", "name"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")]
)
def test_auto_takes_bf16_on_gpus_from_ampere_on(monkeypatch, capability, name):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_precision("auto", torch.device("cuda")).name == name


def test_auto_takes_fp32_on_mps():
    assert choose_precision("auto", torch.device("mps")).name == "fp32"


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_fp16_anywhere_but_on_cuda_is_refused_with_what_to_do(device):
    with pytest.raises(SettingsError) as caught:
        choose_precision("fp16", torch.device(device))
    assert caught.value.exit_code == 2
    assert str(caught.value).splitlines() == [
        f'PRECISION = "fp16" needs a CUDA GPU, and this run is on {device}.',
        'Set PRECISION = "auto".',
    ]


@pytest.mark.parametrize("name", ["bf16", "fp32", "fp16"])
def test_only_the_loss_of_fp16_is_scaled(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    precision = choose_precision(name, torch.device("cuda"))
    assert precision.name == name
    assert precision.scaler().is_enabled() == (name == "fp16")


def test_a_scaler_without_fp16_leaves_loss_and_gradients_alone(cpu_has):
    cpu_has()
    scaler = choose_precision("auto", CPU).scaler()
    weight = torch.tensor([3.0], requires_grad=True)
    loss = (weight**2).sum()
    assert scaler.scale(loss) is loss
    loss.backward()
    optimizer = torch.optim.SGD([weight], lr=0.5)
    scaler.unscale_(optimizer)
    assert weight.grad.item() == 6.0
    assert scaler.state_dict() == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fp16_on_a_gpu_multiplies_in_fp16():
    precision = choose_precision("fp16", torch.device("cuda"))
    with precision.autocast():
        ones = torch.ones(2, 2, device="cuda")
        assert (ones @ ones).dtype == torch.float16
