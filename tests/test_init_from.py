"""Runs that begin from given weights: what these decide, what contradicts them, and resuming."""

import dataclasses
import math
import re
import shutil
import zipfile

import pytest
import torch
from safetensors.torch import load_file

import storage.checkpoint
import train
from distributed.parallel import ALONE
from engine.errors import (
    CheckpointError,
    DataError,
    NumericsError,
    ResourceError,
    RunFinished,
    SettingsError,
)
from engine.lora import add_lora
from engine.memory import as_bytes, count_trained
from engine.optim import default_learning_rate
from environment import prepare_environment
from exchange import beginning
from exchange.beginning import find_beginning
from exchange.gguf import open_gguf
from exchange.huggingface import write_folder
from exchange.opening import open_pretrained
from exchange.pretrained import fitted
from model import GPTConfig, GPTModel
from planning import yardstick
from planning.decisions import decide_recipe, decide_training, read_record
from planning.fine_tuning import (
    LARGE,
    SMOLLM2,
    TOKEN_BITS,
    begin_from,
    count_parameters,
    decide_start,
    fine_tuning,
)
from planning.plan import AUTO_START, RunPlan, Start, resolve_settings
from planning.runs import Candidate, Candidates
from planning.settings_file import read_given_settings
from storage.checkpoint import weights_of
from tests.conftest import LETTERS, REPOSITORY, train_on_letters
from tests.gguf_models import LETTERS as GGUF_LETTERS
from tests.gguf_models import model_of, written
from tests.records import MACHINE, TEXT_FACTS, plan_in_minutes, record_of
from tests.resuming import Bench, compare, uninterrupted
from training import learner
from training.learner import Learner
from training_utils import TrainingConfig

MODEL = GPTConfig(
    vocab_size=300, context_length=1024, emb_dim=48, n_heads=3, n_layers=2, drop_rate=0.1
)
START = Start("seed (run, step 9)", "0" * 64, MODEL)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a finished run on eight letters."""
    return train_on_letters(
        tmp_path_factory.mktemp("tiny"),
        max_steps=30,
        eval_freq=15,
        batch_size=8,
        max_length=24,
        learning_rate=3e-2,
        model_overrides={"emb_dim": 16, "n_heads": 2, "n_layers": 1, "drop_rate": 0.2},
    )


@pytest.fixture
def begin(workdir, no_pictures):
    """Prepare a run with some settings; lower-case names are custom_params."""
    (workdir / "text.txt").write_text(LETTERS[::-1], encoding="utf-8")

    def prepare(**given):
        params = {name: value for name, value in given.items() if name.islower()}
        values = {"DATA": "text.txt", "PRECISION": "fp32", "custom_params": params}
        values |= {name: value for name, value in given.items() if name.isupper()}
        lines = [f"{name} = {value!r}\n" for name, value in values.items()]
        (workdir / "settings.py").write_text("".join(lines), encoding="utf-8")
        return prepare_environment("settings.py")

    return prepare


def plan_of(**given) -> RunPlan:
    params = {name: value for name, value in given.items() if name.islower()}
    ours = {name: value for name, value in given.items() if name.isupper()}
    values = {"INIT_FROM": "runs/seed", "CUSTOM_MODE": True, "custom_params": params} | ours
    return resolve_settings(values, "config_run.py")


@pytest.mark.slow
@pytest.mark.parametrize("QUICK_MODE", [True, False])
def test_a_run_from_another_one_has_its_model_tokenizer_and_weights_in_every_mode(
    QUICK_MODE, begin, tiny, capsys
):
    given = open_pretrained(str(tiny))
    env = begin(INIT_FROM=str(tiny), QUICK_MODE=QUICK_MODE, RUN_NAME="mine")
    printed = capsys.readouterr().out
    assert f"✓ Using {given.source} model configuration\n" in printed
    assert "✓ Using fine-tuning training config (3 epochs)" in printed
    assert env.tokenizer.fingerprint == given.tokenizer.fingerprint
    assert env.model.config == dataclasses.replace(given.config, drop_rate=0.0)
    for name, value in given.weights().items():
        assert torch.equal(env.model.get_parameter(name), value), name
    usual = default_learning_rate(env.model.config.emb_dim)
    assert env.train_config.learning_rate == pytest.approx(0.1 * usual)
    assert (env.train_config.num_epochs, env.train_config.patience) == (3, 3)
    # the yardstick is the figure that a finished run ends with
    score = env.learner.score(env.val_loader, env.tokenizer)
    start = env.run.record.start
    assert start.bits_per_byte == pytest.approx(score.bits_per_byte, rel=1e-6)
    assert (start.fingerprint, start.measured_share) == (given.fingerprint, 1)
    said = f"{score.bits_per_byte:.3f} bits a byte on the validation text, before"
    assert said in printed
    with pytest.raises(RunFinished):
        begin(INIT_FROM=str(tiny), QUICK_MODE=QUICK_MODE, DRY_RUN=True)
    assert said in capsys.readouterr().out


@pytest.mark.slow
def test_what_training_has_added_is_told_and_kept_beside_what_the_weights_had(begin, tiny, capsys):
    import main

    env = begin(INIT_FROM=str(tiny), CUSTOM_MODE=True, max_steps=5, RUN_NAME="mine")
    main.run_pipeline(env)
    before = read_record(env.run.path).start.bits_per_byte
    assert f"before training {before:.3f}" in capsys.readouterr().out
    # it can be written with and begun from again, after its source is gone
    again = open_pretrained(str(env.run.path))
    assert again.config == env.model.config


@pytest.mark.slow
def test_a_run_goes_on_without_the_file_that_it_began_from_bit_for_bit(workdir, monkeypatch, tiny):
    bench = Bench(workdir, monkeypatch)
    source = workdir / "source"
    shutil.copytree(tiny, source)
    # weights this large have no copy in memory
    monkeypatch.setattr(train, "keeps_best_on_disk", lambda model, device: True)
    settings = {"INIT_FROM": str(source), "TOKENIZER": None, "model_overrides": {"drop_rate": 0.1}}
    expected = uninterrupted(bench, **settings)
    bench.describe("run", **settings)
    bench.signal_at("take_step", 1, 9, after=True)
    assert not bench.session()
    shutil.rmtree(source)
    compare(bench.finish(), expected)
    assert bench.stopped_at == [1, 9]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "lora_rank"), [("folder", 4), ("gguf", None)])
def test_a_run_from_a_file_goes_on_after_a_kill_bit_for_bit(kind, lora_rank, workdir, monkeypatch):
    model, source = model_of("llama"), workdir / "source.gguf"
    if kind == "gguf":
        written(source, model)
    else:
        source = workdir / "source"
        write_folder(source, model.config, weights_of(model), GGUF_LETTERS, card="A test's.")
    settings = {"INIT_FROM": str(source), "TOKENIZER": None, "model_overrides": {"drop_rate": 0.1}}
    settings |= {"save_every": 4} | ({} if lora_rank is None else {"lora_rank": lora_rank})
    bench = Bench(workdir, monkeypatch)
    expected = uninterrupted(bench, **settings)
    bench.describe("run", **settings)
    take_step = learner.take_step

    def killed_at_the_eleventh(*arguments, **options):
        if (
            options.get("stop") is not None
            and bench.env.run.path.joinpath("checkpoints", "step-00000008").exists()
        ):
            raise SystemExit("killed")
        return take_step(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="killed"):
        patch.setattr(learner, "take_step", killed_at_the_eleventh)
        bench.session()
    compare(bench.finish(), expected)


@pytest.mark.slow
def test_a_run_without_a_checkpoint_needs_its_source_again(begin, tiny, workdir):
    source = workdir / "source"
    shutil.copytree(tiny, source)
    env = begin(INIT_FROM=str(source), RUN_NAME="mine")
    with env.run.opened():
        pass
    shutil.rmtree(source)
    with pytest.raises(SettingsError, match="is no model"):
        begin(INIT_FROM=str(source), RUN_NAME="mine")


def test_an_adapter_is_refused_where_frozen_weights_lack_the_tokens_of_conversations(
    begin, tiny, workdir
):
    (workdir / "qa.csv").write_text("question,answer\na,b\nb,a\n", encoding="utf-8")
    given = {"INIT_FROM": str(tiny), "DATA": "qa.csv", "CUSTOM_MODE": True}
    with pytest.raises(SettingsError) as caught:
        begin(**given, lora_rank=2)
    assert "has no tokens <|im_start|> and <|im_end|>" in str(caught.value)
    assert "Set lora_rank to None" in str(caught.value)
    env = begin(**given)
    assert env.prompts[0].ends[0] == env.tokenizer.vocab_size - 1


def test_other_weights_are_told_as_other_settings_are(begin, tiny, workdir, capsys):
    source = workdir / "source"
    shutil.copytree(tiny, source)
    env = begin(INIT_FROM="source", RUN_NAME="mine")
    with env.run.opened():
        pass
    with pytest.raises(CheckpointError, match=r"init_from: 'source' then, None now"):
        begin(RUN_NAME="mine", TOKENIZER="char")
    # the same name, trained further
    last = max((source / "checkpoints").glob("step-*"))
    shutil.rmtree(source / "best")
    shutil.move(last, source / "best" / last.name)
    assert open_pretrained(str(source)).fingerprint != env.run.record.start.fingerprint
    with pytest.raises(CheckpointError, match=r"the weights of INIT_FROM: sha256 .* then, .* now"):
        begin(INIT_FROM="source", RUN_NAME="mine")
    begin(INIT_FROM="source")
    said = "mine is unfinished, but differs (the weights of INIT_FROM: sha256"
    assert said in "".join(begin(INIT_FROM="source").run.notes)


def test_all_that_contradicts_the_weights_is_named_at_once():
    with pytest.raises(SettingsError) as caught:
        plan_of(MODEL="mini", TOKENIZER="char", RESUME=True)
    assert "INIT_FROM ('runs/seed') and MODEL ('mini') both set the model" in str(caught.value)
    assert "INIT_FROM ('runs/seed') and TOKENIZER ('char') both" in str(caught.value)
    assert "RESUME is True" in str(caught.value)
    with pytest.raises(SettingsError, match=r'INIT_FROM is "auto".*MINUTES is None'):
        plan_of(INIT_FROM="auto")
    plan = plan_of(emb_dim=64, n_layers=2, drop_rate=0.3, max_length=2048)
    with pytest.raises(SettingsError) as caught:
        begin_from(plan, START, "char")
    problems = str(caught.value).splitlines()[1:]
    assert ['model_overrides["emb_dim"] is 64, and seed' in problems[0], len(problems)] == [True, 2]
    assert 'custom_params["max_length"] is 2,048, and seed (run, step 9) knows 1,024' in problems[1]


def test_the_context_is_the_weights_own_up_to_512_tokens_or_as_set_and_dropout_is_off():
    for given, context, dropout in (
        ({}, 512, 0),
        ({"max_length": 1024, "drop_rate": 0.1}, 1024, 0.1),
        ({"max_length": 16}, 16, 0),
        ({"CUSTOM_MODE": False, "QUICK_MODE": True}, 512, 0),
        ({"MINUTES": 5}, 512, 0),
    ):
        plan = begin_from(plan_of(**given), START, "char")
        assert (plan.model["context_length"], plan.model["drop_rate"]) == (context, dropout)
        assert (plan.tokenizer, plan.most_steps, plan.recipe) == ("char", None, None)
    short = dataclasses.replace(START, config=dataclasses.replace(MODEL, context_length=32))
    assert begin_from(plan_of(), short, "char").model["context_length"] == 32


def test_the_page_on_fine_tuning_shows_settings_that_are_valid(workdir):
    page = (REPOSITORY / "docs" / "fine-tuning.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (workdir / "fine_tune.py").write_text(block, encoding="utf-8")
    plan = resolve_settings(*read_given_settings("fine_tune.py"))
    assert plan.run.names_weights and plan.run.MINUTES
    listed = set(re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE))
    assert {f'"{SMOLLM2}"', f'"{AUTO_START}"', "None"} <= listed


def test_fine_tuning_chooses_around_what_is_set():
    cpu = torch.device("cpu")

    def decided(ranks=1, start=START, **given) -> TrainingConfig:
        plan = begin_from(plan_of(**given), start, "char")
        return decide_training(plan, cpu, 10_000, None, ranks)

    usual = default_learning_rate(48)
    for given, rate, batch, patience in (
        ({}, 0.1 * usual, (4, 1), 3),
        ({"optimizer": "muon"}, 0.1 * default_learning_rate(48, "muon"), (4, 1), 3),
        ({"learning_rate": 0.02, "patience": 9}, 0.02, (4, 1), 9),
        ({"batch_size": 2}, 0.1 * usual, (2, 2), 3),
        ({"gradient_accumulation_steps": 2}, 0.1 * usual, (2, 2), 3),
        ({"max_length": 64}, 0.1 * usual, (32, 1), 3),
        ({"MINUTES": 5, "batch_size": 3}, 0.1 * usual, (3, 1), 3),
    ):
        found = decided(**given)
        assert found.learning_rate == pytest.approx(rate), given
        assert (found.batch_size, found.gradient_accumulation_steps) == batch, given
        assert found.patience == patience
    assert decided(ranks=3).batch_size == 6
    # a large model makes a step after each window, on a CPU
    sizes = {"vocab_size": 300, "context_length": 1024, "emb_dim": 1536, "n_heads": 12}
    large = dataclasses.replace(START, config=GPTConfig(**sizes, n_layers=2))
    assert count_parameters(large) > LARGE
    assert decided(start=large).batch_size == 1
    assert decided(start=large).gradient_accumulation_steps == 1
    plan = begin_from(plan_of(), large, "char")
    assert fine_tuning(plan, "cuda")["batch_size"] == 4


@pytest.mark.parametrize("changes", [{}, {"architecture": "llama", "n_kv_heads": 1}])
def test_the_parameters_of_a_start_are_counted_without_a_model(changes):
    config = dataclasses.replace(MODEL, **changes, activation=None, positions=None, ff_dim=None)
    model = GPTModel(GPTConfig(**dataclasses.asdict(config) | {"tie_embeddings": False}))
    start = dataclasses.replace(START, config=model.config)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert count_parameters(start) == matrices


def test_auto_takes_the_start_that_is_expected_to_be_better_and_says_why():
    plan = plan_of(INIT_FROM="auto", MINUTES=5.0, CUSTOM_MODE=False)
    facts = dataclasses.replace(TEXT_FACTS, leaked=0.0)
    decided = decide_recipe(plan, facts, lambda: MACHINE, None)
    alone = decided.recipe.bits_per_byte
    for rate, is_better in ((1.1 * TOKEN_BITS / alone, True), (0.9 * TOKEN_BITS / alone, False)):
        text = dataclasses.replace(
            facts, bytes_per_token={"seed.json": rate}, vocabularies={"seed.json": 300}
        )
        found = decide_start(plan, decided, START, text)
        assert (found.start == START, found.recipe is None) == (is_better, is_better)
        assert f"{rate:.2f} bytes a token here" in found.origins["start"].en
        assert found.asked() == plan.asked()
    noise = dataclasses.replace(facts, bz2_bits=facts.entropies[0], val_bytes=10**5)
    unreadable = decide_recipe(plan, noise, lambda: MACHINE, None)
    reason = decide_start(plan, unreadable, START, text).origins["start"].en
    assert reason == "random weights: the order of the text's bytes tells almost nothing"
    small = dataclasses.replace(decided.choice.machine, memory=count_parameters(START) * 19)
    cramped = dataclasses.replace(
        decided, choice=dataclasses.replace(decided.choice, machine=small)
    )
    reason = decide_start(plan, cramped, START, text).origins["start"].en
    assert re.search("takes about .* to train, and .* are free", reason)
    fresh = decide_start(plan, decided, None, None)
    assert fresh.origins["start"].en == "random weights: smollm2-135m is not at hand"
    narrow = plan_of(INIT_FROM="auto", MINUTES=5.0, emb_dim=64)
    reason = decide_start(narrow, decided, START, text).origins["start"].en
    assert reason.startswith('random weights: model_overrides["emb_dim"] is 64')


def test_weights_are_cut_to_fewer_positions_and_tokens_and_new_tokens_get_the_mean():
    torch.manual_seed(0)
    config = dataclasses.replace(MODEL, tie_embeddings=False)
    weights = {name: p.detach() for name, p in GPTModel(config).named_parameters()}
    for n_tokens, n_known in ((290, 300), (300, 300), (303, 300), (303, 280)):
        smaller = dataclasses.replace(config, context_length=16, vocab_size=n_tokens)
        found = fitted(weights, smaller, n_known)
        model = GPTModel(smaller)
        storage.checkpoint.load_weights(model, found, "the weights", ALONE)
        same = min(n_tokens, n_known)
        ids = torch.arange(16)[None]
        expected = GPTModel(config)
        storage.checkpoint.load_weights(expected, weights, "the weights", ALONE)
        model.eval(), expected.eval()
        assert torch.allclose(model(ids)[..., :same], expected(ids)[..., :same], atol=1e-6)
        for name in ("token_embedding.weight", "head.weight"):
            mean = weights[name][:n_known].mean(0)
            assert torch.allclose(found[name][same:], mean, atol=1e-7)


def test_a_tokenizer_that_is_gone_from_a_run_is_named(begin, tiny, workdir):
    source = workdir / "source"
    shutil.copytree(tiny, source)
    (source / "tokenizer.json").unlink()
    with pytest.raises((CheckpointError, DataError), match=r"tokenizer\.json"):
        begin(INIT_FROM=str(source))


def test_weights_in_a_gguf_file_that_memory_has_no_room_for_are_refused(tmp_path, monkeypatch):
    pretrained = open_gguf(written(tmp_path / "a.gguf", model := model_of("llama")))
    needed = 4 * model.count_parameters()
    for room in (needed, needed - 1):
        monkeypatch.setattr("exchange.pretrained.available_memory", lambda device, n=room: n)
        if room == needed:
            assert pretrained.weights().keys() == weights_of(model).keys()
        else:
            with pytest.raises(ResourceError, match=r"a\.gguf take .* KB of memory, and"):
                pretrained.weights()


def test_a_pickle_with_compressed_parts_is_refused_unread(tmp_path):
    model, folder = model_of("gpt2"), tmp_path / "model"
    write_folder(folder, model.config, weights_of(model), GGUF_LETTERS, card="A test's.")
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(stored, folder / "pytorch_model.bin")
    assert open_pretrained(str(folder)).weights().keys() >= weights_of(model).keys()
    with zipfile.ZipFile(folder / "pytorch_model.bin") as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in content.items():
            archive.writestr(name, value)
    with pytest.raises(CheckpointError, match="holds more than tensors, or is damaged"):
        open_pretrained(str(folder))


@pytest.mark.slow
def test_a_dry_run_tells_the_disk_that_an_adapter_and_its_frozen_weights_take(begin, tiny, capsys):
    for lora_rank, n_bytes in ((None, None), (2, None)):
        with pytest.raises(RunFinished):
            begin(
                INIT_FROM=str(tiny),
                CUSTOM_MODE=True,
                max_steps=2,
                keep_checkpoints=2,
                DRY_RUN=True,
                **({} if lora_rank is None else {"lora_rank": lora_rank}),
            )
        printed = capsys.readouterr().out
        model = GPTModel(open_pretrained(str(tiny)).config)
        whole = 4 * model.count_parameters()
        n_bytes = 4 * whole * 3
        if lora_rank is not None:
            add_lora(model, lora_rank, seed=0)
            n_bytes = 4 * 4 * count_trained(model) * 3 + whole
        assert f"on disk up to {as_bytes(n_bytes)}, for checkpoints" in printed


def test_auto_opens_weights_even_where_a_run_from_random_ones_may_go_on(
    tiny, monkeypatch, tmp_path, capsys
):
    """Its text may have changed since, and a new run chooses anew."""
    opened = open_pretrained(str(tiny))
    monkeypatch.setattr(beginning, "open_pretrained", lambda where: opened)
    plan = plan_in_minutes(INIT_FROM="auto")
    record = record_of(plan)
    assert record.start is None and record.choice is not None
    run = Candidate(tmp_path, record, "char-0", "0" * 64)
    candidates = Candidates(tmp_path, False, "0", "now", (run,))
    found, left, weights = find_beginning(plan, candidates, tmp_path / "cache", ALONE)
    assert (found.start, left.runs, weights.start.source) == (None, (run,), opened.source)

    start = Start(opened.source, opened.fingerprint, opened.config)
    run = dataclasses.replace(run, record=dataclasses.replace(record, start=start, choice=None))
    candidates = dataclasses.replace(candidates, runs=(run,))
    assert "around a text" not in capsys.readouterr().out
    monkeypatch.setattr(beginning, "frame_of", lambda tokenizer: "<s>")
    found, left, _ = find_beginning(plan, candidates, tmp_path / "cache", ALONE)
    assert (found.start, left.runs) == (start, (run,))
    assert found.origins["start"].en.startswith(f"the weights that {tmp_path} began from; RESUME")
    said = f"Note: {opened.source}: its tokenizer puts <s> around a text elsewhere; not here\n"
    assert capsys.readouterr().out == said


def test_a_batch_that_takes_the_time_of_the_measurement_is_scored_once(begin, tiny, monkeypatch):
    now, calls, score = 0.0, [], Learner.score

    def slow(learner, loader, tokenizer, n_batches):
        nonlocal now
        now += 100.0
        calls.append(n_batches)
        return score(learner, loader, tokenizer, n_batches)

    monkeypatch.setattr(yardstick.time, "perf_counter", lambda: now)
    monkeypatch.setattr(Learner, "score", slow)
    env = begin(INIT_FROM=str(tiny), RUN_NAME="mine")
    assert calls == [1]
    assert env.run.record.start.bits_per_byte > 0


def test_weights_that_are_no_numbers_end_before_training(begin, tiny, monkeypatch):
    given = open_pretrained(str(tiny))
    damaged = {name: torch.full_like(value, math.nan) for name, value in given.weights().items()}
    found = dataclasses.replace(given, weights=lambda: damaged)
    monkeypatch.setattr(beginning, "open_pretrained", lambda *_: found)
    with pytest.raises(NumericsError, match=r"before training, .* has a loss of nan"):
        begin(INIT_FROM=str(tiny))


def test_only_large_models_in_fp32_on_a_cpu_give_freed_blocks_back(begin, tiny, monkeypatch):
    calls = []
    monkeypatch.setattr(beginning, "return_large_blocks", lambda: calls.append(1))
    begin(INIT_FROM=str(tiny))
    assert calls == []
    monkeypatch.setattr(beginning, "LARGE", 1)
    begin(INIT_FROM=str(tiny), PRECISION="bf16")
    assert calls == []
    begin(INIT_FROM=str(tiny))
    assert calls == [1]
