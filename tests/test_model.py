"""The model against transformers' classes, its parameters counted by hand, and its promises."""

import dataclasses
import json
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import model as model_module
from benchmarks.peers import save_for_transformers
from engine.attention import attend, attend_within, count_kept_weights, find_parts
from engine.errors import SettingsError
from engine.norm import RMSNorm
from engine.optim import build_adamw
from engine.precision import Precision
from engine.rotary import RotaryTable, rotate
from model import Dropout, GPTConfig, GPTModel, attention_kernel
from tests.conftest import REPOSITORY

CONFIGURATIONS = json.loads((REPOSITORY / "config.json").read_text(encoding="utf-8"))
LLAMA = {"architecture": "llama", "n_heads": 4}
SHARED_HEADS = LLAMA | {"n_kv_heads": 2}
QWEN3 = SHARED_HEADS | {"qk_norm": True}
FORMS = {"gpt2": {}, "llama": LLAMA, "shared heads": SHARED_HEADS, "qwen3": QWEN3}
LLAMA3_SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3_SCALING |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
SHAPE = {"vocab_size": 31, "context_length": 12, "emb_dim": 24, "n_heads": 3, "n_layers": 2}
all_forms = pytest.mark.parametrize("form", FORMS)
gpt2_and_qwen3 = pytest.mark.parametrize("form", ["gpt2", "qwen3"])


def new_model(**changes) -> GPTModel:
    """A two-layer model with its initial weights."""
    torch.manual_seed(0)
    return GPTModel(GPTConfig(**SHAPE | changes))


@torch.no_grad()
def tiny_model(**changes) -> GPTModel:
    """A two-layer model with seeded random weights, norms and biases included."""
    model = new_model(**changes)
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_ids(model: GPTModel, *shape: int) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, shape, generator=seeded(1))


def test_shipped_models_have_their_parameters_with_the_tied_head_counted_once():
    without_qkv_biases = 124_439_808 - 12 * 3 * 768  # OpenAI's has them
    for name, expected in (("small", 6_540_800), ("gpt2-124m", without_qkv_biases)):
        with torch.device("meta"):
            model = GPTModel(GPTConfig(vocab_size=50_257, **CONFIGURATIONS[name]))
        assert model.count_parameters() == expected


@pytest.mark.parametrize("tie_embeddings", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("changes", "in_a_block"),
    [
        # norms; qkv; out_proj; the MLP
        ({}, 4 * 24 + 24 * 72 + 24 * 25 + 24 * 96 + 96 + 96 * 24 + 24),
        (LLAMA, 2 * 24 + 24 * 72 + 24 * 24 + 3 * 24 * 64),
        (SHARED_HEADS, 2 * 24 + 24 * 48 + 24 * 24 + 3 * 24 * 64),
        (QWEN3, 2 * 24 + 2 * 6 + 24 * 48 + 24 * 24 + 3 * 24 * 64),
    ],
    ids=FORMS,
)
def test_parameters_and_operations_are_those_counted_by_hand(changes, in_a_block, tie_embeddings):
    model = new_model(tie_embeddings=tie_embeddings, **changes)
    final_norm, head = 24 if changes else 48, 31 * 24
    worked_with = 2 * in_a_block + final_norm + head
    looked_up = (0 if changes else 12 * 24) + (0 if tie_embeddings else head)
    assert model.count_parameters() == worked_with + looked_up
    assert model.flop_per_token() == 6 * worked_with + 12 * 2 * 24 * 12


@pytest.mark.slow  # transformers takes seconds to import
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": False, "qkv_bias": True},
        {"tie_embeddings": False, "activation": "relu", "ff_dim": 40},
        LLAMA | {"tie_embeddings": False, "rope_theta": 100.0},
        LLAMA | {"n_kv_heads": 1, "qkv_bias": True, "mlp_bias": True, "norm_eps": 0.1},
        LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 3.0}, "rope_theta": 50.0},
        LLAMA | {"rope_scaling": LLAMA3_SCALING, "rope_theta": 20.0, "out_bias": True},
        {"activation": "gelu_exact", "norm_eps": 0.1, "out_bias": False, "mlp_bias": False},
        QWEN3 | {"head_dim": 16, "emb_dim": 30},
        QWEN3 | {"tie_embeddings": False, "n_kv_heads": 4},
        QWEN3 | {"rope_theta": 100.0},
        QWEN3 | {"context_length": 600, "n_layers": 1},  # rotary positions far into a long context
    ],
    ids=str,
)
@torch.no_grad()
def test_logits_equal_those_of_transformers_gpt2_llama_and_qwen3(changes, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = tiny_model(**changes)
    save_for_transformers(model, tmp_path)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report.values()), report  # nothing is missing or left over
    ids = random_ids(model, 2, model.config.context_length)
    expected = theirs.eval()(ids).logits
    assert expected.std() > 0.5  # a comparison of near-zeros would prove nothing
    torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("positions", [slice(7), torch.tensor([[0, 1, 2, 0, 1], [3, 4, 5, 6, 0]])])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_a_training_step_rotates_as_without_gradients_and_back_by_the_same_angles(
    positions, dtype, close
):
    cos, sin = RotaryTable(7, 6, 100.0)(positions)
    draws = torch.randn(2, 2, cos.shape[-2], 3, 6, generator=seeded(0)).to(dtype)
    x, gradient = draws[0].requires_grad_(), draws[1]
    with torch.no_grad():
        expected = rotate(x, cos, sin)
    rotated = rotate(x, cos, sin)
    assert rotated.dtype == dtype
    torch.testing.assert_close(rotated, expected, rtol=close, atol=close)
    (found,) = torch.autograd.grad(rotated, x, gradient)
    # a rotation's transpose is its inverse
    with torch.no_grad():
        back = rotate(gradient, cos, -sin)
    torch.testing.assert_close(found, back, rtol=close, atol=close)
    products = [(a.double() * b.double()).sum() for a, b in ((expected, gradient), (x, found))]
    torch.testing.assert_close(products[0], products[1], rtol=close, atol=10 * close)


@torch.no_grad()
def test_sines_are_positions_like_learned_ones_and_embeddings_are_scaled_up_to_them():
    model = tiny_model(positions="sinusoidal")
    waves = [[t / 10_000 ** (2 * (c // 2) / 24) for c in range(24)] for t in range(12)]
    sines = [[(math.sin, math.cos)[c % 2](wave) for c, wave in enumerate(row)] for row in waves]
    state = model.state_dict() | {
        "token_embedding.weight": math.sqrt(24) * model.token_embedding.weight,
        "position_embedding.weight": torch.tensor(sines),
        "head.weight": model.head.weight,
    }
    learned = tiny_model(tie_embeddings=False)
    learned.load_state_dict(state)
    ids = random_ids(model, 3, 12)
    torch.testing.assert_close(model(ids), learned(ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "changes", [*FORMS.values(), {"positions": "sinusoidal"}], ids=[*FORMS, "sinusoidal"]
)
@torch.no_grad()
def test_a_position_sees_nothing_of_later_tokens_or_other_rows(changes):
    model = tiny_model(**changes)
    ids = random_ids(model, 2, 12)
    before = model(ids)
    for t in range(12):
        changed = ids.clone()
        changed[:, t] = (changed[:, t] + 1) % model.config.vocab_size
        after = model(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert (after[:, t:] != before[:, t:]).any(dim=-1).all()
    alone = torch.cat([model(row[None]) for row in ids])
    torch.testing.assert_close(before, alone, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="13 token ids, but the model's context_length is 12"):
        model(random_ids(model, 1, 13))


@torch.no_grad()
def test_under_autocast_logits_stay_near_those_of_fp32():
    model = tiny_model(**QWEN3)
    ids = random_ids(model, 2, 12)
    with warnings.catch_warnings(), torch.autocast("cpu", dtype=torch.bfloat16):
        warnings.simplefilter("error")  # torch warns of norms whose formats don't fit
        found = model(ids)
    assert found.dtype == torch.bfloat16
    expected = model(ids)
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_what_is_left_out_is_the_architectures_own():
    shape = {"vocab_size": 31, "context_length": 8, "emb_dim": 64, "n_heads": 4, "n_layers": 1}
    gpt2 = {"ff_dim": 256, "activation": "gelu", "positions": "learned", "n_kv_heads": 4}
    gpt2 |= {"head_dim": 16, "norm_eps": 1e-5, "out_bias": True, "mlp_bias": True}
    # 8/3 x 64 is 171: up to the next multiple of 64
    llama = {"ff_dim": 192, "activation": "swiglu", "positions": "rope", "n_kv_heads": 4}
    llama |= {"head_dim": 16, "norm_eps": 1e-6, "out_bias": False, "mlp_bias": False}
    for changes, expected in (
        ({}, gpt2),
        (LLAMA, llama),
        (
            LLAMA | {"emb_dim": 96},
            llama | {"ff_dim": 256, "head_dim": 24},
        ),  # 8/3 x 96 to the letter
        (LLAMA | {"ff_dim": 100, "n_kv_heads": 1}, llama | {"ff_dim": 100, "n_kv_heads": 1}),
    ):
        config = GPTConfig(**shape | changes)
        assert {name: getattr(config, name) for name in expected} == expected
        assert GPTConfig(**dataclasses.asdict(config)) == config  # as settings.json gives it back
    # a number of shared heads that shares none is no mistake
    assert GPTConfig(**shape, n_kv_heads=4) == GPTConfig(**shape)


def test_a_shape_that_no_model_can_have_is_refused_with_what_it_may_be():
    in_gpt2, in_llama = (f'; where architecture is "{a}" it must be' for a in ("gpt2", "llama"))
    kinds = f'activation is "swiglu"{in_gpt2} "gelu" or "gelu_exact" or "relu"'
    llama_only = '; it may be set where architecture is "llama" only'
    shape = {"vocab_size": 9, "context_length": 8, "emb_dim": 24, "n_heads": 4, "n_layers": 1}
    for changes, problem in (
        ({"emb_dim": 60, "n_heads": 8}, "emb_dim (60) must be a multiple of n_heads (8)"),
        (
            LLAMA | {"emb_dim": 36},
            "emb_dim (36) / n_heads (4) must be even: rotary positions turn pairs",
        ),
        (
            {"emb_dim": 33, "n_heads": 3, "positions": "sinusoidal"},
            'emb_dim (33) must be even where positions is "sinusoidal"',
        ),
        ({"positions": "rope"}, f'positions is "rope"{in_gpt2} "learned" or "sinusoidal"'),
        ({"activation": "swiglu"}, kinds),
        (LLAMA | {"positions": "learned"}, f'positions is "learned"{in_llama} "rope"'),
        (LLAMA | {"activation": "gelu"}, f'activation is "gelu"{in_llama} "swiglu"'),
        (LLAMA | {"n_kv_heads": 3}, "n_heads (4) must be a multiple of n_kv_heads (3)"),
        (LLAMA | {"n_kv_heads": 8}, "n_heads (4) must be a multiple of n_kv_heads (8)"),
        (LLAMA | {"head_dim": 5}, "head_dim (5) must be even: rotary positions turn pairs"),
        (
            LLAMA | {"rope_scaling": {"rope_type": "yarn"}},
            'rope_scaling["rope_type"] is \'yarn\'; it must be "linear" or "llama3"',
        ),
        (
            LLAMA | {"rope_scaling": {"rope_type": "linear", "low": 1}},
            'rope_scaling of "linear" must have "rope_type", "factor", and nothing else',
        ),
        (
            LLAMA | {"rope_scaling": LLAMA3_SCALING | {"factor": 0}},
            'rope_scaling["factor"] is 0; it must be a number above 0',
        ),
        (
            LLAMA | {"rope_scaling": LLAMA3_SCALING | {"high_freq_factor": 1.0}},
            'rope_scaling["low_freq_factor"] must be below its "high_freq_factor"',
        ),
        ({"n_kv_heads": 2}, f"n_kv_heads is 2{llama_only}"),
        ({"qk_norm": True}, f"qk_norm is True{llama_only}"),
        ({"rope_theta": 500.0}, f"rope_theta is 500.0{llama_only}"),
        ({"rope_scaling": {"rope_type": "x"}}, f"rope_scaling is {{'rope_type': 'x'}}{llama_only}"),
    ):
        with pytest.raises(SettingsError) as caught:
            GPTConfig(**shape | changes)
        assert str(caught.value).split("\n")[1:] == [f"  {problem}"]


@pytest.mark.parametrize(
    "changes",
    [
        {"n_layers": 1, "qkv_bias": True},
        {"n_layers": 3, "tie_embeddings": False},
        QWEN3 | {"n_layers": 2},
    ],
    ids=str,
)
@torch.no_grad()
def test_initial_weights_are_those_of_gpt2_and_guess_uniformly(changes):
    model = new_model(vocab_size=300, context_length=128, emb_dim=128, **{"n_heads": 4} | changes)
    residual_std = 0.02 / math.sqrt(2 * model.config.n_layers)
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            assert not value.any(), name
        elif "norm" in name:
            assert (value == 1).all(), name
        else:
            residual = name.endswith(("out_proj.weight", "mlp.2.weight", "mlp.down.weight"))
            expected = residual_std if residual else 0.02
            assert value.std().item() == pytest.approx(expected, rel=0.03), name
            assert abs(value.mean().item()) < 0.05 * expected, name
    assert (model.head.weight is model.token_embedding.weight) == model.config.tie_embeddings
    logits = model(random_ids(model, 2, 128))
    loss = logits.logsumexp(-1) - logits.mean(-1)  # the mean over every possible target
    assert loss.mean().item() == pytest.approx(math.log(300), rel=0.02)


@pytest.mark.parametrize("zero_init", [True, False])
@all_forms
@torch.no_grad()
def test_with_zero_init_alone_each_block_begins_as_the_identity(form, zero_init):
    model = new_model(**FORMS[form], zero_init=zero_init).eval()
    x = torch.randn(2, 12, 24)
    angles = model.rotary(slice(12)) if form != "gpt2" else None
    for block in model.blocks:
        assert torch.equal(block(x, angles), x) == zero_init
    projections = [p.weight for block in model.blocks for p in block.residual_projections()]
    zeros = [p for p in model.blocks.parameters() if p.dim() == 2 and not p.any()]
    # were there more of them, nothing would ever be learnt
    assert {*map(id, zeros)} == ({*map(id, projections)} if zero_init else set())


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_embeddings": False, "activation": "relu", "positions": "sinusoidal"},
        LLAMA | {"n_kv_heads": 1, "qk_norm": True, "zero_init": True},
    ],
    ids=str,
)
def test_one_batch_is_learnt_by_heart(changes):
    model = new_model(vocab_size=40, context_length=16, emb_dim=32, **{"n_heads": 2} | changes)
    window = random_ids(model, 4, 17)
    optimizer = build_adamw(model, learning_rate=1e-2, weight_decay=0.0)
    for _ in range(50):
        loss = F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


@gpt2_and_qwen3
@pytest.mark.parametrize("rates", [{"drop_rate": 0.5}, {"attention_drop_rate": 0.5}])
@torch.no_grad()
def test_dropout_acts_in_training_mode_only(rates, form):
    model, undropped = tiny_model(**FORMS[form], **rates), tiny_model(**FORMS[form])
    ids = random_ids(model, 2, 12)
    assert torch.equal(model.eval()(ids), undropped(ids))
    assert not torch.equal(model.train()(ids), undropped(ids))
    assert not torch.equal(model(ids), model(ids))
    assert torch.equal(undropped.train()(ids), undropped.eval()(ids))


@pytest.mark.parametrize("rate", [1e-9, 0.1, 0.9, 0.99999])
def test_dropout_keeps_each_element_with_its_probability_and_the_mean(rate):
    torch.manual_seed(0)
    x = torch.ones(401, 501, requires_grad=True)  # an odd number of elements
    dropped = Dropout(rate)(x)
    kept_share = 1 - min(round(rate * 65536), 65535) / 65536
    values = dropped.detach().unique().tolist()
    assert values[-1:] == pytest.approx([1 / kept_share]) and values[:-1] in ([0.0], [])
    deviation = math.sqrt(kept_share * (1 - kept_share) / x.numel())
    kept = dropped.detach().flatten() > 0
    assert abs(kept.float().mean().item() - kept_share) <= 4 * deviation
    dropped.sum().backward()
    assert torch.equal(x.grad, dropped.detach())  # of ones


def test_elements_that_share_a_random_number_are_dropped_independently():
    torch.manual_seed(0)
    kept = (Dropout(0.3)(torch.ones(100_000, 4)) > 0).float()
    correlations = torch.corrcoef(torch.cat((kept, kept.roll(1, 0)), 1).T) - torch.eye(8)
    assert correlations.abs().max() < 4 / math.sqrt(len(kept))


@torch.no_grad()
def test_embeddings_both_residual_paths_and_attention_are_dropped_at_the_rate_asked_for():
    model = tiny_model(context_length=512, n_layers=1, drop_rate=0.7).train()
    block, seen = model.blocks[0], {}
    block.register_forward_pre_hook(lambda _, args: seen.update(start=args[0]))
    block.mlp_norm.register_forward_pre_hook(lambda _, args: seen.update(middle=args[0]))
    block.register_forward_hook(lambda _, args, out: seen.update(end=out))
    model(random_ids(model, 2, 512))
    for part in (seen["start"], seen["middle"] - seen["start"], seen["end"] - seen["middle"]):
        assert (part == 0).float().mean().item() == pytest.approx(0.7, abs=0.03)

    attention = tiny_model(n_heads=1, attention_drop_rate=0.7).blocks[0].attention
    attention.out_proj.weight.copy_(torch.eye(24))
    attention.out_proj.bias.zero_()
    x = torch.randn(1, 1, 24, generator=seeded(2)).expand(4000, -1, -1)
    kept = attention.eval()(x, None)[0, 0]  # one position sees only itself: this is its value
    dropped = attention.train()(x, None)[:, 0]  # each row is all zeros, or the value / 0.3
    is_zero = (dropped == 0).all(dim=-1)
    assert is_zero.float().mean().item() == pytest.approx(0.7, abs=0.03)
    torch.testing.assert_close(dropped[~is_zero], (kept / 0.3).expand_as(dropped[~is_zero]))


def gradients_and_kept(model: GPTModel, checkpointing: bool, autocast: bool) -> tuple[list, int]:
    """The gradients of a batch, and how many numbers the forward pass kept for them."""
    kept: list[int] = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    torch.manual_seed(7)  # the dropout's
    model.train().zero_grad()
    model.activation_checkpointing = checkpointing
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(random_ids(model, 3, 12)).float().logsumexp(-1).mean()
        by_forward = sum(kept)
        loss.backward()
    return [p.grad for p in model.parameters()], by_forward


@gpt2_and_qwen3
@pytest.mark.parametrize(
    ("rate", "autocast"), [(0.0, False), (0.3, False), (0.3, True)], ids=["fp32", "drop", "bf16"]
)
def test_activation_checkpointing_keeps_less_and_changes_no_gradient(form, rate, autocast):
    model = tiny_model(n_layers=3, drop_rate=rate, attention_drop_rate=rate, **FORMS[form])
    expected, usual = gradients_and_kept(model, False, autocast)
    found, kept = gradients_and_kept(model, True, autocast)
    assert kept < 0.5 * usual
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert any(gradient.any() for gradient in found)


def test_activation_checkpointing_is_for_gradients_alone(monkeypatch):
    model, calls = tiny_model(), []
    model.activation_checkpointing = True
    monkeypatch.setattr("model.checkpoint", lambda *args, **_: calls.append(args) or args[1])
    for training in (True, False):
        for gradients in (False, True):
            calls.clear()
            with torch.set_grad_enabled(gradients):
                model.train(training)(random_ids(model, 1, 4))
            assert len(calls) == (2 if gradients else 0)


@pytest.mark.parametrize(
    ("n_kv_heads", "n_tokens"), [(4, 1), (4, 24), (1, 64), (2, 150), (2, 257), (4, 300)]
)
def test_plain_products_attend_as_the_kernel_does(n_kv_heads, n_tokens):
    """On a CPU in bf16, where gradients are wanted: one block, some that keep their weights and
    some that compute them again; both kernels against fp64."""
    generator = seeded(0)
    # as the model has them: (B, T, H, D), and then transposed
    shapes = [(2, n_tokens, heads, 16) for heads in (4, n_kv_heads, n_kv_heads)]
    draws = (torch.randn(shape, generator=generator) for shape in (*shapes, shapes[0]))
    *inputs, upstream = (draw.bfloat16().transpose(1, 2) for draw in draws)

    def run(dtype: torch.dtype, is_plain: bool) -> list[torch.Tensor]:
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
        out = attend(*leaves, 0.0, is_plain=is_plain)
        out.backward(upstream.to(dtype))
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    exact, kernel = (run(dtype, False) for dtype in (torch.float64, torch.bfloat16))
    plain = run(torch.bfloat16, True)
    for true, by_kernel, by_products in zip(exact, kernel, plain, strict=True):
        assert by_products.dtype == torch.bfloat16
        error, usual = ((found - true).norm() for found in (by_products, by_kernel))
        assert error <= max(1.5 * usual, 0.01 * true.norm())
    # else both were the kernel's; a single position attends to itself alone
    assert n_tokens == 1 or not torch.equal(kernel[0], plain[0])
    for true, by_products in zip(exact, run(torch.float64, True), strict=True):
        torch.testing.assert_close(by_products, true)


def test_plain_products_keep_no_weights_of_long_windows():
    def kept(n_tokens: int) -> int:
        """How many numbers are kept beyond queries, keys and values."""
        q, k, v = (torch.ones(1, 2, n_tokens, 8, requires_grad=True) for _ in range(3))
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            attend(q, k, v, 0.0, is_plain=True)
        return sum(tensor.numel() for tensor in saved) - 3 * q.numel()

    parts = torch.tensor([[0] * 100 + [100] * 200])  # short texts in a long window
    q, k, v = (torch.ones(1, 2, 300, 8, requires_grad=True) for _ in range(3))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        attend_within(find_parts(parts, as_mask=False), q, k, v, 0.0, is_plain=True)
    assert sum(tensor.numel() for tensor in saved) == 3 * q.numel()
    # the lower half, and of the blocks on the diagonal the upper one
    assert kept(256) == 2 * 64 * (64 + 128 + 192 + 256)
    assert kept(257) == kept(512) == 0
    counted = [count_kept_weights(torch.device("cpu"), n, 0.0) for n in (256, 257)]
    assert counted == [kept(256) / 2, 0]


@pytest.mark.parametrize(("rate", "expected"), [(0.0, "flash attention"), (0.1, "math")])
def test_the_attention_kernel_is_named(rate, expected):
    config = GPTConfig(**SHAPE | {"emb_dim": 192}, attention_drop_rate=rate)
    precision = Precision("bf16", "as set", "cpu")
    assert attention_kernel(config, precision, torch.device("cpu")) == expected


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gated_mlp_computes_its_product_again_and_no_bit_changes(
    checkpointing, autocast, monkeypatch
):
    torch.manual_seed(0)
    mlp, calls, own = model_module.GatedMLP(16, 40, bias=True), [], model_module.gated
    monkeypatch.setattr(model_module, "gated", lambda x: calls.append(len(x)) or own(x))
    x, kept = torch.randn(2, 6, 16), []

    def as_written(x: torch.Tensor) -> torch.Tensor:
        gate, up = mlp.gate_up(x).chunk(2, dim=-1)
        return mlp.down(F.silu(gate) * up)

    def gradients(forward) -> list[torch.Tensor]:
        inputs = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = (
                checkpoint(forward, inputs, use_reentrant=False)
                if checkpointing
                else (forward(inputs))
            )
        return [y, *torch.autograd.grad(y.float().square().sum(), [inputs, *mlp.parameters()])]

    for one, other in zip(gradients(mlp), gradients(as_written), strict=True):
        assert torch.equal(one, other)
    assert len(calls) == 2 + checkpointing  # forward, and in the backward pass
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = mlp(x)
    widths = [t.shape[-1] for t in kept if t.shape[:-1] in ((2, 6), (12,))]
    assert y.requires_grad and sorted(widths) == [16, 80]  # the input, gate and up


def test_a_model_on_the_meta_device_draws_no_weights(monkeypatch):
    """Drawing normal numbers there imports sympy, for seconds."""
    normal = torch.nn.init.normal_

    def drawn(tensor: torch.Tensor, *arguments, **options) -> torch.Tensor:
        assert not tensor.is_meta
        return normal(tensor, *arguments, **options)

    monkeypatch.setattr(torch.nn.init, "normal_", drawn)
    monkeypatch.setattr(torch.nn.modules.sparse.init, "normal_", drawn)
    for architecture in ("gpt2", "llama"):
        with torch.device("meta"):
            made = GPTModel(GPTConfig(10, 8, 16, 2, 1, architecture=architecture))
        assert all(p.is_meta for p in made.parameters())


def test_rmsnorm_is_torchs_and_keeps_its_input_alone():
    ours, torchs = RMSNorm(24, eps=1e-5), torch.nn.RMSNorm(24, eps=1e-5)
    generator = seeded(0)
    for norm in (ours, torchs):
        torch.nn.init.uniform_(norm.weight, 0.5, 2, generator=seeded(1))
    x = (3 * torch.randn(2, 5, 24, generator=generator)).requires_grad_()
    upstream = torch.randn(2, 5, 24, generator=generator)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = ours(x)
    assert sum(tensor.numel() for tensor in saved) == x.numel() + 10 + 24
    expected = torchs(x)
    torch.testing.assert_close(y, expected)
    inputs = (x, ours.weight)
    for found, true in zip(
        torch.autograd.grad(y, inputs, upstream, retain_graph=True),
        torch.autograd.grad(expected, (x, torchs.weight), upstream),
        strict=True,
    ):
        torch.testing.assert_close(found, true)
    one_row = torch.autograd.grad(ours(x[0, 0]), x, upstream[0, 0])[0]
    torch.testing.assert_close(one_row[0, 0], torch.autograd.grad(y, x, upstream)[0][0, 0])
    ours.weight.requires_grad_(False)  # as with an adapter
    torch.testing.assert_close(
        torch.autograd.grad(ours(x), x, upstream), torch.autograd.grad(torchs(x), x, upstream)
    )
