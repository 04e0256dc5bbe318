"""LoRA: an adapter learns beside frozen weights, is kept alone, and is merged where it is used."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save

from benchmarks.peers import save_for_transformers
from data import plan_windows
from distributed.parallel import ALONE
from engine.errors import CheckpointError, ResourceError, SettingsError
from engine.lora import add_lora, merged
from engine.loss import next_token_loss
from engine.memory import count_trained, estimate_memory, head_bytes
from engine.optim import build_adamw
from engine.precision import Precision
from exchange.adapter import their_adapter, their_adapter_settings, write_adapter
from exchange.huggingface import write_folder
from exchange.opening import open_pretrained
from exchange.saved_run import load_run
from model import GPTConfig, GPTModel
from planning.choices import Choices
from planning.machine import Machine, choose_frozen, fresh_model
from planning.plan import resolve_settings
from scripts import export
from scripts.options import run_program
from storage.checkpoint import (
    CheckpointStore,
    read_adapter,
    read_frozen,
    read_safetensors,
    read_weights,
    safetensors_chunks,
    weights_of,
)
from tests.conftest import LETTERS, train_in, train_on_letters
from tests.hostile import reseal
from tests.letters import CPU, FP32
from tests.resuming import Bench, compare, uninterrupted
from tests.test_parallel import (
    LOSSES,
    NORM,
    WEIGHTS,
    alone,
    assert_same_to_the_last_bit,
    facts,
    final,
    furthest,
    needs_signals,
    settings_of,
    steps_gone_on_from,
    together,
)
from text.tokenizer import CharTokenizer
from training_utils import TrainingConfig

LLAMA = {"architecture": "llama", "n_kv_heads": 2, "qk_norm": True}
both = pytest.mark.parametrize("changes", [{"qkv_bias": True}, LLAMA], ids=["gpt2", "llama"])


def new_model(**changes) -> GPTModel:
    torch.manual_seed(0)
    return GPTModel(GPTConfig(40, 16, 32, 4, 2, **changes))


def batch(model: GPTModel) -> torch.Tensor:
    return torch.randint(40, (4, 17), generator=torch.Generator().manual_seed(1))


def learn(model: GPTModel, steps: int) -> list[float]:
    """The losses of some steps on one batch."""
    ids, losses = batch(model), []
    optimizer = build_adamw(model, learning_rate=1e-2, weight_decay=0.1)
    for _ in range(steps):
        loss = model(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@both
def test_an_adapter_begins_as_nothing_learns_alone_and_merges_into_equal_weights(changes):
    model = new_model(**changes)
    before = {name: value.clone() for name, value in weights_of(model).items()}
    ids = batch(model)[:, :-1]
    expected = model(ids)
    add_lora(model, 4, seed=3)
    assert torch.equal(model(ids), expected)
    losses = learn(model, 60)
    assert losses[-1] < 0.9 * losses[0]  # the head is frozen, and random
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in before.items())
    adapter = weights_of(model)
    assert {name.rpartition(".")[2] for name in adapter} == {"lora_a", "lora_b"}
    # queries, keys and values; attention's output; the two or three matrices of the MLP
    assert len(adapter) == 2 * 4 * 2
    plain = new_model(**changes)
    plain.load_state_dict(merged(before, adapter), strict=False)
    torch.testing.assert_close(plain(ids), model(ids), rtol=0, atol=1e-5)
    assert (plain(ids) - expected).abs().max() > 0.1


def test_an_adapter_is_the_same_for_the_same_seed():
    models = [new_model() for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        torch.rand(seed)  # other draws before it make no difference
        add_lora(model, 4, seed)
    one, same, other = (weights_of(model)["blocks.1.mlp.0.lora_a"] for model in models)
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_the_same_one():
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(2, 5, 8, generator=generator), torch.randn(30, 8)
    targets = torch.randint(30, (2, 5), generator=generator)
    gradients = []
    for trained in (True, False):
        x, weight = hidden.clone().requires_grad_(), head.clone().requires_grad_(trained)
        (2 * next_token_loss(x, weight, targets)).backward()
        assert (weight.grad is not None) == trained
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_a_frozen_head_has_fewer_rows_of_logits_at_once_and_the_same_loss(monkeypatch):
    V, generator, found = 20_000, torch.Generator().manual_seed(0), []
    hidden = torch.randn(1, 300, 8, generator=generator)
    head = torch.randn(V, 8, generator=generator)
    targets = torch.randint(V, (1, 300), generator=generator)
    products, mm = [], torch.mm

    def counted(x: torch.Tensor, *arguments, **options) -> torch.Tensor:
        products.append(len(x))
        return mm(x, *arguments, **options)

    monkeypatch.setattr(torch, "mm", counted)
    for trained in (True, False):
        x, weight = hidden.clone().requires_grad_(), head.clone().requires_grad_(trained)
        loss = next_token_loss(x, weight, targets)
        loss.backward()
        found.append((loss.detach(), x.grad))
    torch.testing.assert_close(*found)
    # logits, their gradient's products by the head and for it; then twice logits and the first
    assert products == [300, 300, V, 150, 150, 150, 150]
    sizes = [head_bytes(head.requires_grad_(t), 300, FP32) for t in (True, False)]
    assert sizes == [300 * V * 4 + 8 * V * 8, 2**22 // V * V * 4]


def test_an_adapter_takes_a_fraction_of_the_memory_of_training_all():
    def needed(model: GPTModel):
        return estimate_memory(
            model, n_tokens=16, n_windows=1, precision=FP32, device=CPU, keeps_best=True
        )

    model = new_model()
    full = needed(model)
    add_lora(model, 2, seed=0)
    adapted, trained = needed(model), count_trained(model)
    assert (adapted.gradients, adapted.optimizer, adapted.best_weights) == (
        4 * trained,
        8 * trained,
        4 * trained,
    )
    assert trained < 0.15 * model.count_parameters()
    assert adapted.total(1) < 0.6 * full.total(1)


@both
def test_frozen_matrices_in_the_runs_precision_give_the_same_numbers_in_less_memory(
    changes, tmp_path
):
    precision, found = Precision("bf16", "as set", "cpu"), []
    for frozen in (torch.float32, torch.bfloat16):
        model = new_model(**changes)
        add_lora(model, 4, seed=3, frozen=frozen)
        for name, value in weights_of(model).items():
            value.add_(0.1 if name.endswith("lora_b") else 0.0)
        ids = batch(model)
        with precision.autocast():
            loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        adapter = [p.grad for p in model.parameters() if p.requires_grad]
        found.append((loss.detach(), *adapter))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    # without autocast, as a library's user may call it: the frozen matrices are rounded
    rounded = new_model(**changes)
    for weight, _ in rounded.hidden_matrices():
        weight.data = weight.data.bfloat16().float()
    add_lora(rounded, 4, seed=3)
    for name, value in weights_of(rounded).items():
        value.add_(0.1 if name.endswith("lora_b") else 0.0)
    assert torch.equal(model(ids[:, :-1]), rounded(ids[:, :-1]))
    # the run's folder has them as they are, and they are read in fp32
    CheckpointStore(tmp_path, "run-a", 2).keep_frozen(model)
    kept = read_frozen(tmp_path, "run-a")
    for name, value in rounded.named_parameters():
        if "lora_" not in name:
            assert torch.equal(kept[name], value), name
    sizes = [
        estimate_memory(m, n_tokens=16, n_windows=1, precision=precision, device=CPU)
        for m in (model, rounded)
    ]
    hidden = sum(weight.numel() for weight, _ in model.hidden_matrices())
    assert sizes[1].weights - sizes[0].weights == 2 * hidden


def machine_of(precision: str, choices: Choices | None) -> Machine:
    return Machine(CPU, ALONE, Precision(precision, "as set", "cpu"), choices=choices)


def test_the_format_of_frozen_matrices_is_the_runs_unless_a_trial_finds_fp32_clearly_faster(
    tmp_path, capsys
):
    def chosen(name: str, choices: Choices | None = None) -> torch.dtype:
        return choose_frozen(machine_of(name, choices))

    assert chosen("fp32") == torch.float32  # nothing to choose, and nothing is timed
    for number, (bf16_s, expected) in enumerate([(1.0, torch.bfloat16), (1.2, torch.float32)]):
        choices = Choices(tmp_path / str(number), CPU, 1)
        choices.keep("frozen weights of products in bf16", {"bf16": bf16_s, "fp32": 1.0})
        assert chosen("bf16", choices) == expected
    assert "Frozen weights: fp32 (bf16 1.2e+03 ms, fp32 1e+03 ms)" in capsys.readouterr().out


def test_an_adapter_is_refused_only_where_the_weights_and_their_copy_do_not_fit(monkeypatch):
    shape = {"emb_dim": 64, "n_heads": 2, "n_layers": 2}
    plan = resolve_settings(
        {"CUSTOM_MODE": True, "MODEL": "small", "custom_params": {"model_overrides": shape}}, "c.py"
    )
    windows, _ = plan_windows(999, max_length=16, stride=16, batch_size=4, train_ratio=0.9)
    machine = Machine(CPU, ALONE, FP32)
    matrices = 2 * 40 * 64 + 2 * (2 * 64 * (64 + 4 * 64))
    for room, refused in ((8 * matrices, (True, False)), (8 * matrices - 1, (True, True))):
        monkeypatch.setattr("planning.machine.available_memory", lambda device, room=room: room)
        for rank, is_refused in zip((None, 4), refused, strict=True):
            asked = TrainingConfig(lora_rank=rank)
            if is_refused:
                with pytest.raises(ResourceError, match="or a smaller model as INIT_FROM"):
                    fresh_model(plan, asked, windows, 40, machine)
            else:
                assert fresh_model(plan, asked, windows, 40, machine).config.emb_dim == 64


@pytest.fixture(scope="module")
def seed_run(tmp_path_factory):
    """The folder of a finished run to begin from."""
    return train_on_letters(
        tmp_path_factory.mktemp("seed_run"),
        max_steps=2,
        eval_freq=2,
        batch_size=8,
        max_length=24,
        model_overrides={"architecture": "llama", "emb_dim": 16, "n_heads": 2, "n_layers": 2},
    )


def test_a_checkpoint_holds_the_adapter_alone_and_is_read_as_the_entire_model(tmp_path):
    model = new_model(**LLAMA)
    add_lora(model, 4, seed=3)
    losses = learn(model, 3)
    store = CheckpointStore(tmp_path, "run-a", 2)
    optimizer = build_adamw(model, learning_rate=1e-2, weight_decay=0.1)
    store.keep_frozen(model)
    store.save(3, model, optimizer, {}, None)
    step, weights = read_weights(tmp_path, "run-a")
    assert step == 3
    plain, ids = new_model(**LLAMA), batch(model)
    plain.load_state_dict(weights, strict=False)
    torch.testing.assert_close(plain(ids[:, :16]), model(ids[:, :16]), rtol=0, atol=1e-5)
    kept = read_safetensors(tmp_path / "checkpoints" / "step-00000003" / "model.safetensors")
    assert kept.keys() == read_adapter(tmp_path, "run-a").keys() == weights_of(model).keys()

    again = new_model(**LLAMA)
    add_lora(again, 4, seed=3)
    store.restore(again, build_adamw(again, learning_rate=1e-2, weight_decay=0.1))
    assert learn(again, 1) == learn(model, 1) < losses

    place = tmp_path / "frozen" / "step-00000000" / "model.safetensors"
    for content, says in (
        (b"damaged", "the run's frozen weights are lost"),
        (save({"head.weight": torch.zeros(2)}), "is no adapter of the weights"),
    ):
        place.write_bytes(content)
        if content != b"damaged":
            reseal(place.parent)
        with pytest.raises(CheckpointError, match=says):
            read_weights(tmp_path, "run-a")


@pytest.mark.slow
def test_a_run_with_an_adapter_resumes_bit_for_bit_and_is_enough_by_itself(
    workdir, monkeypatch, seed_run
):
    bench = Bench(workdir, monkeypatch)
    source = workdir / "source"
    shutil.copytree(seed_run, source)
    given = open_pretrained(str(source)).weights()
    settings = {"INIT_FROM": str(source), "TOKENIZER": None, "lora_rank": 4}
    settings |= {"model_overrides": {"drop_rate": 0.1}}
    expected = uninterrupted(bench, **settings)
    bench.describe("run", **settings)
    bench.signal_at("take_step", 1, 9, after=True)
    assert not bench.session()
    shutil.rmtree(source)
    compare(bench.finish(), expected)
    assert bench.stopped_at == [1, 9]

    run = bench.env.run.path
    newest = max((run / "checkpoints").glob("step-*"))
    kept = read_safetensors(newest / "model.safetensors")
    assert all(name.endswith(("lora_a", "lora_b")) for name in kept)
    frozen = read_safetensors(run / "frozen" / "step-00000000" / "model.safetensors")
    assert frozen.keys() == given.keys()
    loaded = load_run(run, which="last", weights="fp32")
    ids = torch.arange(10)[None]
    model = bench.env.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids), model(ids), rtol=0, atol=1e-5)
    weights = open_pretrained(str(run)).weights()
    assert weights.keys() == given.keys()
    assert not any(torch.equal(weights[n], given[n]) for n in given if ".attention." in n)

    with pytest.raises(SettingsError, match="which is no folder of transformers' files"):
        write_adapter(workdir / "out" / "adapter", run, "last")
    source.mkdir()
    (source / "config.json").touch()
    write_adapter(workdir / "out" / "adapter", run, "last")
    left = read_safetensors(workdir / "out" / "adapter" / "adapter_model.safetensors")
    down = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    assert torch.equal(left[down], kept["blocks.1.mlp.down.lora_b"])
    settings = json.loads((workdir / "out" / "adapter" / "adapter_config.json").read_bytes())
    assert settings["base_model_name_or_path"] == str(source)
    for place, folder, says in (
        (workdir / "out", run, "exists; name a folder that does not"),
        (workdir / "new", seed_run, "has trained no adapter"),
    ):
        with pytest.raises(SettingsError, match=says):
            write_adapter(place, folder)


@pytest.mark.slow
@needs_signals
def test_two_ranks_fine_tune_as_one_process_does_and_go_on_after_a_kill(tmp_path):
    settings_of(tmp_path, "seed", MODEL="llama-mini", max_steps=3)
    start = {"INIT_FROM": "runs/seed", "TOKENIZER": None, "model_overrides": {"drop_rate": 0.0}}
    kinds = {"all": {}, "adapter": {"lora_rank": 4}}
    for name, more in kinds.items():
        for kind in ("alone", "ddp", "killed"):
            where = {} if kind == "alone" else {"PARALLEL": "ddp"}
            settings_of(tmp_path, f"{name}-{kind}", **start, **more, **where)
    settings_of(tmp_path, "all-fsdp", **start, PARALLEL="fsdp")
    alone(tmp_path, ["seed.py"], *([f"{name}-alone.py"] for name in kinds))
    job = together(
        tmp_path,
        2,
        ["all-fsdp.py"],
        *([f"{name}-ddp.py"] for name in kinds),
        *([f"{name}-killed.py", 1, 5, "SIGKILL", n] for n, name in enumerate(kinds)),
        restarts=2,
    )
    assert steps_gone_on_from(job.out) == {f"{name}-killed": 3 for name in kinds}
    runs = tmp_path / "runs"
    for name in kinds:
        for kind in ("ddp", "fsdp") if name == "all" else ("ddp",):
            one, two = runs / f"{name}-alone", runs / f"{name}-{kind}"
            assert furthest(one, two, *LOSSES, NORM) < 1e-5, (name, kind)
            starts = [facts(run, "summary")["initial_val_bits_per_byte"] for run in (one, two)]
            assert starts[1] == pytest.approx(starts[0], abs=1e-5)
        assert_same_to_the_last_bit(runs / f"{name}-killed", runs / f"{name}-ddp")
    assert len(final(runs / "adapter-ddp", WEIGHTS)) < len(final(runs / "all-ddp", WEIGHTS)) / 2


@pytest.mark.slow  # PEFT and accelerate take seconds to import
@both
@torch.no_grad()
def test_peft_computes_the_same_with_an_adapter_that_leaves(changes, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = new_model(**changes)
    save_for_transformers(model, tmp_path / "base")
    add_lora(model, 4, seed=3)
    adapter = weights_of(model)
    for value in adapter.values():
        value.add_(0.3 * torch.randn_like(value))
    (tmp_path / "adapter").mkdir()
    settings = their_adapter_settings(model.config, 4, str(tmp_path / "base"))
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    tensors = their_adapter(model.config, adapter)
    with open(tmp_path / "adapter" / "adapter_model.safetensors", "wb") as file:
        file.writelines(safetensors_chunks(tensors, {"format": "pt"}))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    ids = batch(model)[:, :16]
    without = base(ids).logits
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=0, atol=1e-5)
    assert (model(ids) - without).abs().max() > 0.1
    names = {name for name, _ in theirs.named_parameters() if "lora_" in name}
    assert len(names) == len(tensors)


@pytest.mark.slow  # PEFT and accelerate take seconds to import
def test_an_adapter_of_rounded_and_padded_weights_is_exported_and_one_of_others_is_not(
    workdir, monkeypatch, capsys
):
    pytest.importorskip("peft")
    torch.manual_seed(3)
    tokenizer = CharTokenizer(LETTERS)
    config = GPTConfig(tokenizer.vocab_size + 5, 32, 64, 4, 2, **LLAMA)
    model = GPTModel(config)
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    write_folder(workdir / "base", config, weights_of(model), tokenizer, card="")
    monkeypatch.setattr("exchange.beginning.choose_frozen", lambda machine: torch.bfloat16)
    (workdir / "text.txt").write_text(LETTERS, encoding="utf-8")
    params = {"max_steps": 4, "lora_rank": 4, "max_length": 32, "learning_rate": 0.05}
    names = "DATA, INIT_FROM, CUSTOM_MODE, RUN_NAME, PRECISION"
    values = '"text.txt", "base", True, "tiny", "fp32"'
    run = train_in(workdir, f"{names} = {values}\ncustom_params = {params!r}\n")
    assert load_run(run).model.config.vocab_size == tokenizer.vocab_size

    def leave(folder: str) -> str:
        arguments = ["export", "--run", str(run), "--to", "peft", folder]
        monkeypatch.setattr("sys.argv", arguments)
        with pytest.raises(SystemExit) as ended:
            run_program(export.main)
        said = capsys.readouterr()
        assert (ended.value.code == 0) == said.out.startswith("✓"), said.err
        return said.err

    said = leave("adapter")
    assert "the run rounded the weights it began from: its logits are within 0.0" in said
    assert "by peft 0" in said and "the adapted model's logits within" in said
    weights = weights_of(model)
    weights["final_norm.weight"] += 1.0
    shutil.rmtree(workdir / "base")
    write_folder(workdir / "base", config, weights, tokenizer, card="")
    assert "CheckpointError: INIT_FROM = 'base' holds other weights than those that" in leave("new")
    assert not (workdir / "new").exists()


def test_an_adapter_needs_given_weights_and_adamw():
    for given, says in (
        ({}, "INIT_FROM is None: an adapter needs weights that INIT_FROM names"),
        ({"INIT_FROM": "auto"}, "INIT_FROM is 'auto': an adapter needs weights"),
        ({"INIT_FROM": "runs/x", "optimizer": "muon"}, 'lora_rank needs optimizer "adamw"'),
    ):
        params = {"lora_rank": 8} | {n: v for n, v in given.items() if n.islower()}
        values = {n: v for n, v in given.items() if n.isupper()}
        with pytest.raises(SettingsError) as caught:
            resolve_settings(
                values | {"CUSTOM_MODE": True, "MINUTES": 5, "custom_params": params}, "config.py"
            )
        assert says in str(caught.value)
