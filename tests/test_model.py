"""The model against transformers' classes, a reference written out by hand, and its promises."""

import dataclasses
import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine.errors import SettingsError
from engine.optim import build_adamw
from engine.precision import Precision
from model import Dropout, GPTConfig, GPTModel, RotaryTable, attend, attention_kernel

CONFIGURATIONS = json.loads(
    (Path(__file__).resolve().parent.parent / "config.json").read_text(encoding="utf-8")
)
GPT2_VOCABULARY = 50_257
LLAMA = {"architecture": "llama", "n_heads": 4}
SHARED_HEADS = LLAMA | {"n_kv_heads": 2}
QWEN3 = SHARED_HEADS | {"qk_norm": True}
FORMS = {"gpt2": {}, "llama": LLAMA, "shared heads": SHARED_HEADS, "qwen3": QWEN3}


def tiny_model(**changes) -> GPTModel:
    """A two-layer model with seeded random weights, norms and biases included."""
    shape = {"vocab_size": 31, "context_length": 12, "emb_dim": 24, "n_heads": 3, "n_layers": 2}
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(**(shape | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def random_ids(model: GPTModel, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(model.config.vocab_size, shape, generator=generator)


# ------------------------------------------------------------------ size


def test_small_model_has_6540800_parameters():
    model = GPTModel(GPTConfig(vocab_size=GPT2_VOCABULARY, **CONFIGURATIONS["small"]))
    assert model.count_parameters() == 6_540_800


def test_gpt2_124m_has_its_parameters_with_the_tied_head_counted_once():
    with torch.device("meta"):
        model = GPTModel(GPTConfig(vocab_size=GPT2_VOCABULARY, **CONFIGURATIONS["gpt2-124m"]))
    embeddings = 50_257 * 768 + 1024 * 768
    attention = 768 * (3 * 768) + 768 * 768 + 768  # qkv has no bias
    mlp = 768 * 3072 + 3072 + 3072 * 768 + 768
    norms = 2 * (768 + 768)
    assert embeddings + 12 * (attention + mlp + norms) + 2 * 768 == 124_412_160
    assert model.count_parameters() == 124_412_160


# ------------------------------------------------------------------ values


def as_transformers(model: GPTModel) -> nn.Module:
    """transformers' GPT-2 with the weights of ours; its Conv1D keeps matrices transposed."""
    transformers = pytest.importorskip("transformers")
    config = model.config
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.context_length,
            n_embd=config.emb_dim,
            n_head=config.n_heads,
            n_layer=config.n_layers,
            n_inner=config.ff_dim,
            activation_function={"gelu": "gelu_new", "relu": "relu"}[config.activation],
            tie_word_embeddings=config.tie_embeddings,
        )
    )
    state = {
        "transformer.wte.weight": model.token_embedding.weight,
        "transformer.wpe.weight": model.position_embedding.weight,
        "transformer.ln_f.weight": model.final_norm.weight,
        "transformer.ln_f.bias": model.final_norm.bias,
        "lm_head.weight": model.head.weight,
    }
    for i, block in enumerate(model.blocks):
        norms = {"ln_1": block.attention_norm, "ln_2": block.mlp_norm}
        for name, norm in norms.items():
            state[f"transformer.h.{i}.{name}.weight"] = norm.weight
            state[f"transformer.h.{i}.{name}.bias"] = norm.bias
        matrices = {
            "attn.c_attn": block.attention.qkv,
            "attn.c_proj": block.attention.out_proj,
            "mlp.c_fc": block.mlp[0],
            "mlp.c_proj": block.mlp[2],
        }
        for name, linear in matrices.items():
            bias = linear.bias if linear.bias is not None else torch.zeros(len(linear.weight))
            state[f"transformer.h.{i}.{name}.weight"] = linear.weight.T
            state[f"transformer.h.{i}.{name}.bias"] = bias
    theirs.load_state_dict(state, strict=True)
    return theirs.eval()


@pytest.mark.parametrize("tie_embeddings", [True, False])
@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("changes", [{}, {"activation": "relu", "ff_dim": 40}])
@torch.no_grad()
def test_logits_equal_transformers_gpt2(tie_embeddings, qkv_bias, changes):
    model = tiny_model(tie_embeddings=tie_embeddings, qkv_bias=qkv_bias, **changes)
    ids = random_ids(model, 3, 12)
    expected = as_transformers(model)(ids).logits
    assert expected.std() > 0.5  # a comparison of near-zeros would prove nothing
    torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-4)


def as_llama(model: GPTModel) -> nn.Module:
    """transformers' Llama, or with qk_norm its Qwen3, with the weights of ours."""
    transformers = pytest.importorskip("transformers")
    config = model.config
    name = "Qwen3" if config.qk_norm else "Llama"
    theirs = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(
            vocab_size=config.vocab_size,
            max_position_embeddings=config.context_length,
            hidden_size=config.emb_dim,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            head_dim=config.emb_dim // config.n_heads,
            num_hidden_layers=config.n_layers,
            intermediate_size=config.ff_dim,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tie_embeddings,
            attention_bias=False,
        )
    )
    state = {
        "model.embed_tokens.weight": model.token_embedding.weight,
        "model.norm.weight": model.final_norm.weight,
        "lm_head.weight": model.head.weight,
    }
    for i, block in enumerate(model.blocks):
        q, k, v = block.attention.qkv.weight.split(block.attention.qkv_rows)
        gate, up = block.mlp.gate_up.weight.chunk(2)
        parts = {
            "input_layernorm": block.attention_norm.weight,
            "post_attention_layernorm": block.mlp_norm.weight,
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": block.attention.out_proj.weight,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": block.mlp.down.weight,
        }
        if config.qk_norm:
            parts["self_attn.q_norm"] = block.attention.q_norm.weight
            parts["self_attn.k_norm"] = block.attention.k_norm.weight
        state |= {f"model.layers.{i}.{name}.weight": part for name, part in parts.items()}
    theirs.load_state_dict(state, strict=True)  # none of theirs is missing, none of ours left over
    return theirs.eval()


@pytest.mark.parametrize("tie_embeddings", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("n_kv_heads", [1, 2, None])
@pytest.mark.parametrize("qk_norm", [False, True], ids=["Llama", "Qwen3"])
@torch.no_grad()
def test_logits_equal_those_of_transformers_llama_and_qwen3(qk_norm, n_kv_heads, tie_embeddings):
    changes = {"n_kv_heads": n_kv_heads, "qk_norm": qk_norm, "tie_embeddings": tie_embeddings}
    model = tiny_model(architecture="llama", n_heads=4, rope_theta=100.0, **changes)
    ids = random_ids(model, 3, 12)
    expected = as_llama(model)(ids).logits
    assert expected.std() > 0.5  # a comparison of near-zeros would prove nothing
    torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", ["llama", "qwen3"])
@torch.no_grad()
def test_rotary_positions_agree_with_transformers_far_into_a_long_context(form):
    model = tiny_model(context_length=600, n_layers=1, **FORMS[form])
    ids = random_ids(model, 1, 600)
    torch.testing.assert_close(model(ids), as_llama(model)(ids).logits, rtol=0, atol=1e-4)


def reference_logits(model: GPTModel, ids: list[int]) -> np.ndarray:
    """(T, V) logits of one row in fp64, position by position and head by head."""
    config = model.config
    weights = {name: value.double().numpy() for name, value in model.state_dict().items()}
    size = config.emb_dim // config.n_heads

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def activation(x):
        if config.activation == "relu":
            return np.maximum(x, 0)
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def position(t):
        if config.positions == "learned":
            return weights["position_embedding.weight"][t]
        waves = [t / 10_000 ** (2 * (c // 2) / config.emb_dim) for c in range(config.emb_dim)]
        return np.array([(math.sin, math.cos)[c % 2](wave) for c, wave in enumerate(waves)])

    scale = math.sqrt(config.emb_dim) if config.positions == "sinusoidal" else 1.0
    embedded = [scale * weights["token_embedding.weight"][token] for token in ids]
    x = np.stack([row + position(t) for t, row in enumerate(embedded)])  # (T, C)
    for i in range(config.n_layers):
        q, k, v = np.split(
            linear(norm(x, f"blocks.{i}.attention_norm"), f"blocks.{i}.attention.qkv"), 3, axis=-1
        )
        mixed = np.zeros_like(x)
        for t in range(len(ids)):
            for head in range(config.n_heads):
                part = slice(head * size, (head + 1) * size)
                scores = k[: t + 1, part] @ q[t, part] / math.sqrt(size)
                shares = np.exp(scores - scores.max())
                mixed[t, part] = (shares / shares.sum()) @ v[: t + 1, part]
        x = x + linear(mixed, f"blocks.{i}.attention.out_proj")
        wide = activation(linear(norm(x, f"blocks.{i}.mlp_norm"), f"blocks.{i}.mlp.0"))
        x = x + linear(wide, f"blocks.{i}.mlp.2")
    return linear(norm(x, "final_norm"), "head")


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@torch.no_grad()
def test_logits_equal_a_reference_written_out_by_hand(activation, positions):
    model = tiny_model(activation=activation, positions=positions)
    ids = random_ids(model, 1, 10)
    expected = torch.from_numpy(reference_logits(model, ids[0].tolist()))
    torch.testing.assert_close(model(ids)[0].double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "changes", [*FORMS.values(), {"positions": "sinusoidal"}], ids=[*FORMS, "sinusoidal"]
)
@torch.no_grad()
def test_changing_a_token_leaves_earlier_logits_unchanged(changes):
    model = tiny_model(**changes)
    ids = random_ids(model, 2, 12)
    before = model(ids)
    for t in range(12):
        changed = ids.clone()
        changed[:, t] = (changed[:, t] + 1) % model.config.vocab_size
        after = model(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert (after[:, t:] != before[:, t:]).any(dim=-1).all()


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_rows_of_a_batch_do_not_see_each_other(form):
    model = tiny_model(**FORMS[form])
    ids = random_ids(model, 3, 12)
    alone = torch.cat([model(row[None]) for row in ids])
    torch.testing.assert_close(model(ids), alone, rtol=0, atol=1e-5)


def test_an_input_longer_than_the_context_is_refused():
    model = tiny_model(context_length=8)
    assert model(random_ids(model, 1, 8)).shape == (1, 8, 31)
    with pytest.raises(ValueError, match="9 token ids, but the model's context_length is 8"):
        model(random_ids(model, 1, 9))


@torch.no_grad()
def test_shared_heads_are_those_of_a_model_that_has_each_of_them_twice():
    shared, whole = tiny_model(**SHARED_HEADS), tiny_model(**LLAMA)
    state = shared.state_dict()
    for i in range(2):
        name = f"blocks.{i}.attention.qkv.weight"
        q, k, v = (part.unflatten(0, (-1, 6)) for part in state[name].split([24, 12, 12]))
        heads = (q, k.repeat_interleave(2, 0), v.repeat_interleave(2, 0))
        state[name] = torch.cat([part.flatten(0, 1) for part in heads])
    whole.load_state_dict(state)
    ids = random_ids(shared, 2, 12)
    torch.testing.assert_close(shared(ids), whole(ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shift", [1, 100])
@torch.no_grad()
def test_with_rotary_positions_only_distances_count(shift):
    attention = tiny_model(**QWEN3).blocks[0].attention
    table = RotaryTable(120, 6, 50.0)
    x = torch.randn(2, 12, 24, generator=torch.Generator().manual_seed(3))
    moved = tuple(part[shift : shift + 12] for part in table(slice(120)))
    found, unmoved = attention(x, moved), attention(x, table(slice(12)))
    torch.testing.assert_close(found, unmoved, rtol=0, atol=1e-4)
    assert (attention(x, None) - unmoved).abs().max() > 1e-2  # positions do matter


@pytest.mark.parametrize("form", ["llama", "qwen3"])
@torch.no_grad()
def test_under_autocast_logits_stay_near_those_of_fp32(form):
    model = tiny_model(**FORMS[form])
    ids = random_ids(model, 2, 12)
    with warnings.catch_warnings(), torch.autocast("cpu", dtype=torch.bfloat16):
        warnings.simplefilter("error")  # torch warns of norms whose formats don't fit
        found = model(ids)
    assert found.dtype == torch.bfloat16
    expected = model(ids)
    assert (found - expected).norm() < 0.02 * expected.norm()


# ------------------------------------------------------------------ the shape


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"ff_dim": 256, "activation": "gelu", "positions": "learned", "n_kv_heads": 4}),
        (
            {"architecture": "llama"},  # 8/3 x 64 is 171: up to the next multiple of 64
            {"ff_dim": 192, "activation": "swiglu", "positions": "rope", "n_kv_heads": 4},
        ),
        ({"architecture": "llama", "emb_dim": 96}, {"ff_dim": 256}),  # 8/3 x 96 to the letter
        ({"architecture": "llama", "ff_dim": 100, "n_kv_heads": 1}, {"ff_dim": 100}),
    ],
    ids=str,
)
def test_what_is_left_out_is_the_architectures_own(changes, expected):
    shape = {"vocab_size": 31, "context_length": 8, "emb_dim": 64, "n_heads": 4, "n_layers": 1}
    config = GPTConfig(**shape | changes)
    assert {name: getattr(config, name) for name in expected} == expected
    assert GPTConfig(**dataclasses.asdict(config)) == config  # as settings.json gives it back


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"emb_dim": 60, "n_heads": 8}, "emb_dim (60) must be a multiple of n_heads (8)"),
        (
            LLAMA | {"emb_dim": 36},
            "emb_dim (36) / n_heads (4) must be even: rotary positions turn pairs",
        ),
        (
            {"emb_dim": 33, "n_heads": 3, "positions": "sinusoidal"},
            'emb_dim (33) must be even where positions is "sinusoidal"',
        ),
        (
            {"positions": "rope"},
            'positions is "rope"; where architecture is "gpt2" it must be "learned" or '
            '"sinusoidal"',
        ),
        (
            {"activation": "swiglu"},
            'activation is "swiglu"; where architecture is "gpt2" it must be "gelu" or "relu"',
        ),
        (
            LLAMA | {"positions": "learned"},
            'positions is "learned"; where architecture is "llama" it must be "rope"',
        ),
        (
            LLAMA | {"activation": "gelu"},
            'activation is "gelu"; where architecture is "llama" it must be "swiglu"',
        ),
        (LLAMA | {"n_kv_heads": 3}, "n_heads (4) must be a multiple of n_kv_heads (3)"),
        (LLAMA | {"n_kv_heads": 8}, "n_heads (4) must be a multiple of n_kv_heads (8)"),
        (
            LLAMA | {"qkv_bias": True},
            'qkv_bias is True; where architecture is "llama" it must be False',
        ),
        (
            {"n_kv_heads": 2},
            'n_kv_heads is 2; it may be set where architecture is "llama" only',
        ),
        (
            {"qk_norm": True},
            'qk_norm is True; it may be set where architecture is "llama" only',
        ),
        (
            {"rope_theta": 500.0},
            'rope_theta is 500.0; it may be set where architecture is "llama" only',
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_shape_that_no_model_can_have_is_refused_with_what_it_may_be(changes, problem):
    shape = {"vocab_size": 9, "context_length": 8, "emb_dim": 24, "n_heads": 4, "n_layers": 1}
    with pytest.raises(SettingsError) as caught:
        GPTConfig(**shape | changes)
    assert str(caught.value).split("\n")[1:] == [f"  {problem}"]


def test_every_wrong_field_of_a_llama_is_reported_at_once():
    wrong = {"positions": "learned", "activation": "relu", "qkv_bias": True, "n_kv_heads": 3}
    with pytest.raises(SettingsError, match="4 problems"):
        tiny_model(**LLAMA | wrong)


def test_a_number_of_shared_heads_that_shares_none_is_no_mistake():
    assert tiny_model(n_kv_heads=3).config.n_kv_heads == 3
    assert tiny_model(n_kv_heads=3).config == tiny_model().config


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tie_embeddings", [True, False], ids=["tied", "untied"])
def test_hidden_matrices_are_every_matrix_of_the_blocks_once(form, tie_embeddings):
    model = tiny_model(tie_embeddings=tie_embeddings, **FORMS[form])
    found = model.hidden_matrices()
    expected = [p for p in model.blocks.parameters() if p.dim() == 2]
    assert sorted(id(weight) for weight, _ in found) == sorted(map(id, expected))
    for weight, rows in found:
        assert sum(rows) == weight.shape[0]
    merged = dict(found)
    heads = 12 if form in ("shared heads", "qwen3") else 24
    block = model.blocks[1]
    assert merged[block.attention.qkv.weight] == (24, heads, heads)
    assert merged[block.attention.out_proj.weight] == (24,)
    mlp = [merged[layer.weight] for layer in block.mlp.children() if hasattr(layer, "weight")]
    assert mlp == ([(96,), (24,)] if form == "gpt2" else [(64, 64), (24,)])


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
    model = tiny_model(tie_embeddings=tie_embeddings, **changes)
    final_norm, head = 24 if changes else 48, 31 * 24
    worked_with = 2 * in_a_block + final_norm + head
    looked_up = (0 if changes else 12 * 24) + (0 if tie_embeddings else head)
    assert model.count_parameters() == worked_with + looked_up
    assert model.flop_per_token() == 6 * worked_with + 12 * 2 * 24 * 12


# ------------------------------------------------------------------ initial weights


@pytest.mark.parametrize("n_layers", [1, 3])
@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_initial_weights_are_those_of_gpt2(n_layers, tie_embeddings):
    torch.manual_seed(0)
    model = GPTModel(
        GPTConfig(
            vocab_size=300,
            context_length=128,
            emb_dim=128,
            n_heads=4,
            n_layers=n_layers,
            qkv_bias=True,
            tie_embeddings=tie_embeddings,
        )
    )
    residual_std = 0.02 / math.sqrt(2 * n_layers)
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            assert not value.any(), name
        elif "norm" in name:
            assert (value == 1).all(), name
        else:
            residual = name.endswith(("out_proj.weight", "mlp.2.weight"))
            expected = residual_std if residual else 0.02
            assert value.std().item() == pytest.approx(expected, rel=0.03), name
            assert abs(value.mean().item()) < 0.05 * expected, name
    assert (model.head.weight is model.token_embedding.weight) == tie_embeddings


def test_initial_weights_of_a_llama_are_drawn_like_those_of_gpt2():
    torch.manual_seed(0)
    shape = {"vocab_size": 300, "context_length": 8, "emb_dim": 128, "n_layers": 2}
    for name, value in GPTModel(GPTConfig(**shape, **QWEN3)).named_parameters():
        if "norm" in name:
            assert (value == 1).all(), name
        else:
            expected = 0.01 if name.endswith(("out_proj.weight", "mlp.down.weight")) else 0.02
            assert value.std().item() == pytest.approx(expected, rel=0.03), name


@pytest.mark.parametrize("zero_init", [True, False])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_with_zero_init_alone_each_block_begins_as_the_identity(form, zero_init):
    torch.manual_seed(0)
    shape = {"vocab_size": 31, "context_length": 12, "emb_dim": 24, "n_heads": 3, "n_layers": 2}
    model = GPTModel(GPTConfig(**shape | FORMS[form], zero_init=zero_init)).eval()
    x = torch.randn(2, 12, 24)
    angles = model.rotary(slice(12)) if form != "gpt2" else None
    for block in model.blocks:
        assert torch.equal(block(x, angles), x) == zero_init
    projections = [p.weight for block in model.blocks for p in block.residual_projections()]
    zeros = [p for p in model.blocks.parameters() if p.dim() == 2 and not p.any()]
    # were there more of them, nothing would ever be learnt
    assert {*map(id, zeros)} == ({*map(id, projections)} if zero_init else set())


@pytest.mark.parametrize("name", ["small", "gpt2-124m"])
@torch.no_grad()
def test_initial_loss_is_that_of_a_uniform_guess(name):
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(vocab_size=GPT2_VOCABULARY, **CONFIGURATIONS[name])).eval()
    logits = model(random_ids(model, 1, 64))
    loss = logits.logsumexp(-1) - logits.mean(-1)  # the mean over every possible target
    assert loss.mean().item() == pytest.approx(math.log(GPT2_VOCABULARY), rel=0.02)


# ------------------------------------------------------------------ learning


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": False, "activation": "relu", "positions": "sinusoidal"},
        {"architecture": "llama"},
        {"architecture": "llama", "n_kv_heads": 1, "qk_norm": True, "zero_init": True},
    ],
    ids=str,
)
def test_one_batch_is_learnt_by_heart(changes):
    torch.manual_seed(0)
    shape = {"vocab_size": 40, "context_length": 16, "emb_dim": 32, "n_heads": 2, "n_layers": 2}
    model = GPTModel(GPTConfig(**shape, **changes))
    window = random_ids(model, 4, 17)
    optimizer = build_adamw(model, learning_rate=1e-2, weight_decay=0.0)
    for _ in range(60):
        loss = F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


@pytest.mark.parametrize("form", ["gpt2", "qwen3"])
@pytest.mark.parametrize("rates", [{"drop_rate": 0.5}, {"attention_drop_rate": 0.5}])
@torch.no_grad()
def test_dropout_acts_in_training_mode_only(rates, form):
    model, undropped = tiny_model(**FORMS[form], **rates), tiny_model(**FORMS[form])
    ids = random_ids(model, 2, 12)
    assert torch.equal(model.eval()(ids), undropped(ids))
    assert not torch.equal(model.train()(ids), undropped(ids))
    assert not torch.equal(model(ids), model(ids))
    assert torch.equal(undropped.train()(ids), undropped.eval()(ids))


@pytest.mark.parametrize("rate", [1e-9, 0.1, 0.5, 0.9, 0.99999])
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


def test_dropout_repeats_with_the_seed_and_takes_nothing_where_it_does_nothing():
    x, before = torch.ones(5), torch.get_rng_state()
    assert Dropout(0.0)(x) is x and Dropout(0.5).eval()(x) is x
    assert torch.equal(torch.get_rng_state(), before)
    layer = Dropout(0.5)
    first = [torch.manual_seed(3), layer(torch.ones(1000))][1]
    torch.manual_seed(3)
    assert torch.equal(layer(torch.ones(1000)), first)
    assert not torch.equal(layer(torch.ones(1000)), first)


@pytest.mark.parametrize("rate", [0.2, 0.7])
@torch.no_grad()
def test_embeddings_and_both_residual_paths_are_dropped_at_the_rate_asked_for(rate):
    model = tiny_model(context_length=512, n_layers=1, drop_rate=rate).train()
    block, seen = model.blocks[0], {}
    block.register_forward_pre_hook(lambda _, args: seen.update(start=args[0]))
    block.mlp_norm.register_forward_pre_hook(lambda _, args: seen.update(middle=args[0]))
    block.register_forward_hook(lambda _, args, out: seen.update(end=out))
    model(random_ids(model, 2, 512))
    added = [seen["start"], seen["middle"] - seen["start"], seen["end"] - seen["middle"]]
    for part in added:
        assert (part == 0).float().mean().item() == pytest.approx(rate, abs=0.03)


@pytest.mark.parametrize("rate", [0.2, 0.7])
@torch.no_grad()
def test_attention_is_dropped_at_the_rate_asked_for(rate):
    attention = tiny_model(n_heads=1, attention_drop_rate=rate).blocks[0].attention
    attention.out_proj.weight.copy_(torch.eye(24))
    attention.out_proj.bias.zero_()
    x = torch.randn(1, 1, 24, generator=torch.Generator().manual_seed(2)).expand(4000, -1, -1)
    kept = attention.eval()(x, None)[0, 0]  # one position sees only itself: this is its value
    dropped = attention.train()(x, None)[:, 0]  # each row is all zeros, or the value / (1 - rate)
    is_zero = (dropped == 0).all(dim=-1)
    assert is_zero.float().mean().item() == pytest.approx(rate, abs=0.03)
    expected = (kept / (1 - rate)).expand_as(dropped[~is_zero])
    torch.testing.assert_close(dropped[~is_zero], expected)


# ------------------------------------------------------------------ activation checkpointing


def gradients_and_kept(model: GPTModel, checkpointing: bool, autocast: bool) -> tuple[list, int]:
    """The gradients of a batch, and how many numbers the forward pass kept for them."""
    kept = 0

    def keep(tensor):
        nonlocal kept
        kept += tensor.numel()
        return tensor

    torch.manual_seed(7)  # the dropout's
    model.train().zero_grad()
    model.activation_checkpointing = checkpointing
    ids = random_ids(model, 3, 12)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(ids).float().logsumexp(-1).mean()
        by_forward = kept
        loss.backward()
    return [p.grad for p in model.parameters()], by_forward


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rates", [{}, {"drop_rate": 0.3, "attention_drop_rate": 0.3}], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_activation_checkpointing_keeps_less_and_changes_no_gradient(form, rates, autocast):
    model = tiny_model(n_layers=3, **FORMS[form], **rates)
    expected, usual = gradients_and_kept(model, False, autocast)
    found, kept = gradients_and_kept(model, True, autocast)
    assert kept < 0.5 * usual
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert any(gradient.any() for gradient in found)


@pytest.mark.parametrize("training", [True, False])
def test_activation_checkpointing_is_for_gradients_alone(training, monkeypatch):
    model = tiny_model().train(training)
    model.activation_checkpointing = True
    calls = []
    monkeypatch.setattr("model.checkpoint", lambda *args, **_: calls.append(args) or args[1])
    with torch.no_grad():
        model(random_ids(model, 1, 4))
    assert calls == []
    model(random_ids(model, 1, 4))
    assert len(calls) == 2


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_plain_products_attend_as_the_kernel_does(n_kv_heads):
    """On a CPU in bf16, where gradients are wanted; both against fp64."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, 24, 16) for heads in (4, n_kv_heads, n_kv_heads)]
    inputs = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    upstream = torch.randn(shapes[0], generator=generator)

    def run(dtype: torch.dtype, is_short: bool) -> list[torch.Tensor]:
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
        out = attend(*leaves, 0.0, is_short=is_short)
        out.backward(upstream.to(dtype))
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    exact, kernel, plain = (
        run(torch.float64, True),
        run(torch.bfloat16, False),
        run(torch.bfloat16, True),
    )
    for true, by_kernel, by_products in zip(exact, kernel, plain, strict=True):
        assert by_products.dtype == torch.bfloat16
        error, usual = ((found - true).norm() for found in (by_products, by_kernel))
        assert error <= max(1.5 * usual, 0.01 * true.norm())
    assert not torch.equal(kernel[0], plain[0])  # else both were the kernel's


def test_plain_products_see_nothing_later():
    q, k, v = torch.randn(3, 1, 2, 8, 4).bfloat16().requires_grad_().unbind()
    before = attend(q, k, v, 0.0, is_short=True)
    k2, v2 = k.detach().clone(), v.detach().clone()
    k2[:, :, 5:] += 9
    v2[:, :, 5:] -= 9
    after = attend(q, k2, v2, 0.0, is_short=True)
    assert torch.equal(before[:, :, :5], after[:, :, :5])
    assert not torch.equal(before[:, :, 5:], after[:, :, 5:])


@pytest.mark.parametrize(("rate", "expected"), [(0.0, "flash attention"), (0.1, "math")])
def test_the_attention_kernel_is_named(rate, expected):
    config = GPTConfig(
        vocab_size=9, context_length=64, emb_dim=64, n_heads=2, n_layers=1, attention_drop_rate=rate
    )
    precision = Precision("bf16", "as set", "cpu")
    assert attention_kernel(config, precision, torch.device("cpu")) == expected
