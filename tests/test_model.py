"""The model against transformers' GPT-2, a reference written out by hand, and its own promises."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine.optim import build_adamw
from model import GPTConfig, GPTModel

CONFIGURATIONS = json.loads(
    (Path(__file__).resolve().parent.parent / "config.json").read_text(encoding="utf-8")
)
GPT2_VOCABULARY = 50_257


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


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
@torch.no_grad()
def test_changing_a_token_leaves_earlier_logits_unchanged(positions):
    model = tiny_model(positions=positions)
    ids = random_ids(model, 2, 12)
    before = model(ids)
    for t in range(12):
        changed = ids.clone()
        changed[:, t] = (changed[:, t] + 1) % model.config.vocab_size
        after = model(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert (after[:, t:] != before[:, t:]).any(dim=-1).all()


@torch.no_grad()
def test_rows_of_a_batch_do_not_see_each_other():
    model = tiny_model()
    ids = random_ids(model, 3, 12)
    alone = torch.cat([model(row[None]) for row in ids])
    torch.testing.assert_close(model(ids), alone, rtol=0, atol=1e-5)


def test_an_input_longer_than_the_context_is_refused():
    model = tiny_model(context_length=8)
    assert model(random_ids(model, 1, 8)).shape == (1, 8, 31)
    with pytest.raises(ValueError, match="9 token ids, but the model's context_length is 8"):
        model(random_ids(model, 1, 9))


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
    "changes", [{}, {"tie_embeddings": False, "activation": "relu", "positions": "sinusoidal"}]
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


@pytest.mark.parametrize("rates", [{"drop_rate": 0.5}, {"attention_drop_rate": 0.5}])
@torch.no_grad()
def test_dropout_acts_in_training_mode_only(rates):
    model, undropped = tiny_model(**rates), tiny_model()
    ids = random_ids(model, 2, 12)
    assert torch.equal(model.eval()(ids), undropped(ids))
    assert not torch.equal(model.train()(ids), undropped(ids))
    assert not torch.equal(model(ids), model(ids))
    assert torch.equal(undropped.train()(ids), undropped.eval()(ids))


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
    kept = attention.eval()(x)[0, 0]  # one position sees only itself: this is its value
    dropped = attention.train()(x)[:, 0]  # each row is all zeros, or the value / (1 - rate)
    is_zero = (dropped == 0).all(dim=-1)
    assert is_zero.float().mean().item() == pytest.approx(rate, abs=0.03)
    expected = (kept / (1 - rate)).expand_as(dropped[~is_zero])
    torch.testing.assert_close(dropped[~is_zero], expected)
