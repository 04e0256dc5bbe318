"""transformers' folders, both ways; transformers itself is the oracle."""

import functools
import gc
import json
import os
import pickle
import random
import shutil
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from engine.errors import CheckpointError, PipelineError, ResourceError, SettingsError
from exchange.huggingface import open_folder, reader_notes, write_folder
from exchange.opening import open_pretrained
from generation import generate
from model import GPTConfig, GPTModel
from storage.checkpoint import assign_weights, weights_of
from tests.faults.saving import forked
from tests.hostile import HOSTILE_TENSORS, Canary, hostile_json, status_of_this_process
from tests.texts import CHINESE, ENGLISH, train_in_the_library
from text.tokenizer import CharTokenizer, Tokenizer, train_bpe
from text.tokenizer_file import END_OF_TEXT

# transformers, which writes their folders, takes seconds to import
pytestmark = pytest.mark.slow
LETTERS = CharTokenizer("abcdefgh ,.\n")
GPT2 = {"n_positions": 24, "n_embd": 32, "n_head": 4, "n_layer": 2}
LLAMA = {
    "max_position_embeddings": 24,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 20.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
GELU = {"n_inner": 40, "activation_function": "gelu", "layer_norm_epsilon": 0.1}
ODD_SIZES = {"head_dim": 12, "rms_norm_eps": 0.1, "num_key_value_heads": 2}
BIASES = {"attention_bias": True, "mlp_bias": True}
LINEAR = {"rope_type": "linear", "rope_theta": 50.0, "factor": 3.0}
THEIRS = {
    "gpt2": ("GPT2", GPT2),
    "gpt2, untied": ("GPT2", GPT2 | GELU | {"tie_word_embeddings": False}),
    "llama": ("Llama", LLAMA),
    "llama, biases": ("Llama", LLAMA | BIASES | {"num_key_value_heads": 1}),
    "llama, tied": ("Llama", LLAMA | ODD_SIZES | {"tie_word_embeddings": True}),
    "llama 3": ("Llama", LLAMA | {"rope_parameters": LLAMA3}),
    "llama, linear": ("Llama", LLAMA | {"rope_parameters": LINEAR}),
    "qwen3": ("Qwen3", LLAMA | {"head_dim": 16, "num_key_value_heads": 2}),
    "qwen3, tied": (
        "Qwen3",
        LLAMA | {"num_key_value_heads": 4, "attention_bias": True, "tie_word_embeddings": True},
    ),
}


@torch.no_grad()
def their_model(kind: str, tokenizer: Tokenizer = LETTERS):
    """A small model of transformers with seeded random weights, norms and biases included."""
    import transformers

    name, settings = THEIRS[kind]
    end = tokenizer.end_of_text_id
    settings = {"vocab_size": tokenizer.vocab_size, "bos_token_id": end, "eos_token_id": end} | (
        settings
    )
    suffix = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings)
    model = getattr(transformers, name + suffix)(config)
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def saved(model, folder: Path, tokenizer: Tokenizer = LETTERS, **options) -> Path:
    model.save_pretrained(folder, **options)
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    return folder


def opened_model(folder: Path) -> GPTModel:
    pretrained = open_pretrained(str(folder))
    with torch.device("meta"):
        model = GPTModel(pretrained.config)
    assign_weights(model, pretrained.weights(), folder)
    return model.eval()


def exported(model: GPTModel, folder: Path, tokenizer: Tokenizer = LETTERS, **options) -> Path:
    write_folder(folder, model.config, weights_of(model), tokenizer, card="A test's.", **options)
    return folder


def change(path: Path, **values) -> None:
    """Change a JSON object; None takes a name out."""
    content = json.loads(path.read_text(encoding="utf-8")) | values
    content = {name: value for name, value in content.items() if values.get(name, 0) is not None}
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A folder of each kind, as transformers writes it; nobody changes them."""
    place = tmp_path_factory.mktemp("theirs")
    return {kind: saved(their_model(kind), place / kind) for kind in THEIRS}


@pytest.fixture
def gpt2(folders, tmp_path) -> Path:
    """A folder of GPT-2 to change."""
    return shutil.copytree(folders["gpt2"], tmp_path / "gpt2")


@pytest.mark.parametrize("kind", THEIRS)
@torch.no_grad()
def test_a_model_of_transformers_has_its_logits_here_and_leaves_as_it_came(kind, folders, tmp_path):
    import transformers

    theirs = their_model(kind)
    ours = opened_model(folders[kind])
    ids = torch.randint(LETTERS.vocab_size, (2, 24))
    expected = theirs(ids).logits
    assert expected.std() > 0.5  # a comparison of near-zeros would prove nothing
    torch.testing.assert_close(ours(ids), expected, rtol=0, atol=1e-4)

    once = exported(ours, tmp_path / "once")
    pretrained = open_folder(once)
    assert (pretrained.config, pretrained.tokenizer.fingerprint) == (
        ours.config,
        LETTERS.fingerprint,
    )
    assert pretrained.fingerprint == open_folder(folders[kind]).fingerprint
    twice = exported(opened_model(once), tmp_path / "twice")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (once / name).read_bytes() == (twice / name).read_bytes()
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        once, output_loading_info=True
    )
    assert type(again) is type(theirs) and not any(report.values()), report
    for name, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_weights_in_shards_in_bf16_and_in_a_pickle_are_the_same(gpt2, tmp_path):
    model = their_model("gpt2")
    expected = open_folder(gpt2).weights()
    assert all(value.dtype == torch.float32 for value in expected.values())
    shards = saved(model, tmp_path / "shards", max_shard_size="20KB")
    assert len(list(shards.glob("*.safetensors"))) > 3
    pickled = shutil.copytree(gpt2, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    state = {n: v for n, v in model.state_dict().items() if n != "lm_head.weight"}
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 24, 24, dtype=torch.bool)  # a mask
    torch.save(state, pickled / "pytorch_model.bin")
    for folder in (shards, pickled):
        found = open_folder(folder).weights()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    half = open_folder(saved(model.bfloat16(), tmp_path / "half"))
    assert half.source == "half (GPT2LMHeadModel, bf16)"
    found = half.weights()
    assert all(torch.equal(found[name], expected[name].bfloat16().float()) for name in expected)


def test_a_head_of_its_own_counts_whatever_the_settings_say(gpt2):
    file = gpt2 / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    embedding = tensors["transformer.wte.weight"]
    for head, is_tied in ((embedding.clone(), True), (embedding + 1, False)):
        safetensors.torch.save_file(tensors | {"lm_head.weight": head}, file)
        pretrained = open_folder(gpt2)
        assert pretrained.config.tie_embeddings == is_tied
        assert ("head.weight" in pretrained.weights()) != is_tied


def texts(count: int) -> list[str]:
    """Texts of pieces that tokenizers treat differently, the samples among them."""
    chooser = random.Random(1)
    pieces = ["def f(x):\n    return x  # ok", "\t\t", "  ", "\r\n", "\x00\x1b[2J", "é", "e\u0301"]
    pieces += [
        "钟声",
        "，",
        "👍🏽",
        "👨‍👩‍👧",
        "١٢٣",
        "ﬁ",
        "\u3000",
        "\u200b",
        "don't",
        "'LL",
        "1234567",
        "a",
    ]
    pieces += [ENGLISH[at : at + 40] for at in range(0, 4000, 40)]
    pieces += [CHINESE[at : at + 20] for at in range(0, 1000, 20)]
    return ["".join(chooser.choices(pieces, k=chooser.randrange(1, 9))) for _ in range(count)]


@pytest.mark.parametrize(
    "changes",
    [
        {"qkv_bias": True, "activation": "relu", "tie_embeddings": False},
        {"architecture": "llama", "n_kv_heads": 2, "head_dim": 12},
        {"architecture": "llama", "qk_norm": True, "tie_embeddings": False},
    ],
    ids=["gpt2", "llama", "qwen3"],
)
def test_ours_continues_prompts_in_transformers_as_here(changes, tmp_path):
    import transformers

    tokenizer = CharTokenizer(ENGLISH)
    config = {"context_length": 40, "emb_dim": 32, "n_heads": 4, "n_layers": 2}
    torch.manual_seed(1)
    model = GPTModel(GPTConfig(vocab_size=tokenizer.vocab_size, **config | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    folder = exported(model, tmp_path / "out", tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    reader = transformers.AutoTokenizer.from_pretrained(folder)
    prompts = [ENGLISH[at : at + 9] for at in range(0, 1600, 200)]
    ours = generate(model, [tokenizer.encode(p) for p in prompts], max_new_tokens=20, temperature=0)
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = theirs.generate(**reader(prompts, return_tensors="pt"), **settings).tolist()
    assert found == ours
    assert len({tuple(row[9:]) for row in ours}) > 4  # not all the same


def test_tokenizers_that_leave_give_transformers_their_ids(tmp_path):
    from transformers import AutoTokenizer

    model = GPTModel(GPTConfig(300, 24, 32, 4, 1))
    for tokenizer in (CharTokenizer(ENGLISH + CHINESE), train_bpe([ENGLISH, CHINESE], 600)):
        exported(model, tmp_path / tokenizer.kind, tokenizer)
        reader = AutoTokenizer.from_pretrained(tmp_path / tokenizer.kind)
        assert reader.convert_tokens_to_ids(reader.eos_token) == tokenizer.end_of_text_id
        for text in texts(200):
            ids = tokenizer.encode(text)
            assert reader.encode(text) == ids
            assert reader.decode(ids) == text


def test_what_a_folder_says_of_its_end_and_its_chats_is_kept(gpt2, tmp_path):
    """With a tokenizer from elsewhere, whose special tokens come first."""
    from transformers import AutoTokenizer

    template = (
        "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    )
    special = (END_OF_TEXT, "<s>", "<|im_start|>", "<|im_end|>", "<|end|>")
    their_tokenizer = train_in_the_library(ENGLISH, 264, *special)
    their_tokenizer.save(str(gpt2 / "tokenizer.json"))
    for file, content in (
        ("tokenizer_config.json", json.dumps({"chat_template": template})),
        (
            "tokenizer_config.json",
            json.dumps({"chat_template": [{"name": "default", "template": template}]}),
        ),
        ("chat_template.jinja", template),
    ):
        (gpt2 / file).write_text(content, encoding="utf-8")
        pretrained = open_folder(gpt2)
        assert pretrained.chat_template == template
        (gpt2 / file).unlink()
    assert open_folder(gpt2).chat_template is None
    model = opened_model(gpt2)
    out = exported(model, tmp_path / "out", pretrained.tokenizer, chat_template=template)
    assert open_folder(out).chat_template == template
    reader = AutoTokenizer.from_pretrained(out)
    said = reader.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert said == "<s><|im_start|>hi<|im_end|>"
    assert json.loads((out / "generation_config.json").read_bytes()) == {
        "bos_token_id": 1,
        "eos_token_id": [3, 0],
    }
    assert json.loads((out / "config.json").read_bytes())["eos_token_id"] == 3


def test_a_tokenizer_without_an_end_leaves_with_one(gpt2, tmp_path):
    from transformers import AutoTokenizer

    train_in_the_library(ENGLISH, 266).save(str(gpt2 / "tokenizer.json"))
    tokenizer = open_folder(gpt2).tokenizer
    assert tokenizer.end_of_text_id == 266
    out = exported(opened_model(gpt2), tmp_path / "out", tokenizer)
    reader = AutoTokenizer.from_pretrained(out)
    assert reader.encode("the" + END_OF_TEXT) == [*tokenizer.encode("the"), 266]
    change(out / "config.json", vocab_size=267)
    with pytest.raises(CheckpointError, match=r"shape \(269, 32\)"):
        open_folder(out)


def test_the_older_files_of_gpt2s_tokenizer_are_read_too(gpt2):
    model = json.loads(train_bpe([ENGLISH], 269).to_json())["model"]
    bpe = train_in_the_library(ENGLISH, 269, END_OF_TEXT)
    for vocab, merges in (
        (model["vocab"], model["merges"]),
        (bpe.get_vocab(), json.loads(bpe.to_str())["model"]["merges"]),
    ):
        (gpt2 / "tokenizer.json").unlink(missing_ok=True)
        (gpt2 / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
        (gpt2 / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
        tokenizer = open_folder(gpt2).tokenizer
        assert tokenizer.vocab_size == 269
        assert tokenizer.end_of_text_id == vocab[END_OF_TEXT]
        for text in texts(50):
            ids = bpe.encode(text).ids if vocab != model["vocab"] else None
            assert ids is None or tokenizer.encode(text) == ids
            assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("gpt2", {"architectures": ["MistralForCausalLM"]}, "'MistralForCausalLM', which can't be"),
        ("gpt2", {"architectures": None, "model_type": "bert"}, "is of 'bert', which can't"),
        ("gpt2", {"n_embd": None, "n_head": None}, "lacks n_embd, n_head"),
        ("gpt2", {"n_embd": "wide"}, "n_embd is 'wide' (str); it must be a whole number"),
        ("gpt2", {"n_layer": 10**9}, "n_layer is 1000000000; it must be"),
        ("gpt2", {"activation_function": "tanh"}, "activation_function is 'tanh'; it can be"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False; only True"),
        ("gpt2", {"quantization_config": {"bits": 4}}, "its weights are quantized"),
        ("gpt2", {"n_layer": 3}, "lack h.2.ln_1.weight"),
        ("gpt2", {"n_layer": 1}, "have what its class does not: h.1."),
        ("gpt2", {"n_positions": 25}, "wpe.weight has the shape (24, 32); by config.json"),
        ("gpt2", {"vocab_size": 2**40}, f"by config.json it is ({2**40}, 32)"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
        ("llama", {"num_attention_heads": 3}, "n_heads (3) must be a multiple of"),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn' can't be expr"),
        ("llama", {"rope_parameters": {"rope_type": "llama3"}}, 'must have "rope_type", "factor"'),
        ("llama", {"rope_parameters": [1]}, "rope_parameters is [1]; it must be an object"),
        ("llama", {"attention_bias": True}, "lack model.layers.0.self_attn.q_proj.bias"),
        ("llama, biases", {"mlp_bias": False}, "have what its class does not: model.layers.0.mlp"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("qwen3", {"layer_types": ["sliding_attention"]}, 'others than "full_attention"'),
    ],
    ids=str,
)
def test_what_can_not_be_expressed_is_refused_by_name(kind, changes, says, folders, tmp_path):
    folder = shutil.copytree(folders[kind], tmp_path / "changed")
    change(folder / "config.json", **changes)
    with pytest.raises(CheckpointError) as caught:
        open_folder(folder)
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 4


def test_older_settings_are_read_as_newer_ones(folders, tmp_path):
    for kind in ("llama 3", "llama, linear", "llama"):
        folder = shutil.copytree(folders[kind], tmp_path / kind)
        rope = json.loads((folder / "config.json").read_bytes())["rope_parameters"]
        theta = rope.pop("rope_theta")
        rope = {"type" if name == "rope_type" else name: value for name, value in rope.items()}
        scaling = rope if len(rope) > 1 else None
        older = {"rope_theta": theta, "rope_scaling": scaling, "rope_parameters": None}
        change(folder / "config.json", architectures=None, head_dim=None, **older)
        assert open_folder(folder).config == open_folder(folders[kind]).config
        change(folder / "config.json", max_position_embeddings=2**21)
        assert open_folder(folder).config.context_length == 1_000_000


def test_what_no_class_can_hold_is_said_before_anything_is_written(tmp_path):
    llama = {"architecture": "llama"}
    for changes, says in (
        ({"positions": "sinusoidal"}, 'no sinusoidal positions: train with positions "learned"'),
        ({"head_dim": 16}, "GPT2LMHeadModel has heads of emb_dim / n_heads, not of 16"),
        (llama | {"head_dim": 16, "emb_dim": 30}, "a multiple of n_heads (4): change one"),
        (llama | {"qk_norm": True, "mlp_bias": True}, "Qwen3ForCausalLM has no biases in its MLP"),
    ):
        shape = {"vocab_size": 300, "context_length": 8, "emb_dim": 32, "n_heads": 4, "n_layers": 1}
        model = GPTModel(GPTConfig(**shape | changes))
        with pytest.raises(SettingsError) as caught:
            exported(model, tmp_path / "deep" / "out")
        assert says in str(caught.value)
    model = GPTModel(GPTConfig(300, 8, 32, 4, 1))
    with pytest.raises(SettingsError, match="exists; name a folder that does not"):
        exported(model, tmp_path)
    with torch.no_grad():
        model.blocks[0].mlp[0].weight[3, 3] = 1e6
    with pytest.raises(SettingsError, match=r"mlp\.0\.weight has weights beyond fp16's range"):
        exported(model, tmp_path / "deep" / "out", dtype="fp16")
    assert list(tmp_path.iterdir()) == []
    assert len(reader_notes(GPTConfig(300, 8, 32, 4, 1, ff_dim=8, activation="relu"))) == 3
    assert reader_notes(GPTConfig(300, 8, 64, 2, 1)) == []


def test_a_folder_that_was_written_may_be_shared_and_holds_what_was_asked_for(tmp_path):
    model = GPTModel(GPTConfig(300, 8, 32, 4, 1))
    out = exported(model, tmp_path / "deep" / "out", dtype="bf16")
    umask = os.umask(0)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o666 & ~umask}
    assert (out / "README.md").read_text() == "A test's."
    settings = json.loads((out / "config.json").read_bytes())
    assert settings["dtype"] == settings["torch_dtype"] == "bfloat16"
    found = open_folder(out).weights()
    for name, value in weights_of(model).items():
        assert torch.equal(found[name], value.bfloat16().float())


def test_weights_beyond_memory_are_refused_before_they_are_read(gpt2, monkeypatch):
    pretrained = open_folder(gpt2)
    monkeypatch.setattr("exchange.pretrained.available_memory", lambda device: 10_000)
    with pytest.raises(ResourceError, match="KB of memory, and 10 KB are free"):
        pretrained.weights()


def test_a_name_of_the_hub_is_its_folder_in_the_librarys_cache(gpt2, tmp_path, monkeypatch):
    import huggingface_hub

    calls = []

    def snapshot_download(name, *, allow_patterns, ignore_patterns):
        calls.append(allow_patterns)
        if name != "somebody/gpt2":
            raise OSError("401 Client Error")
        return str(gpt2)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert open_pretrained("hf:somebody/gpt2").source == "somebody/gpt2 (GPT2LMHeadModel, fp32)"
    assert len(calls) == 1 and "*.safetensors" in calls[0] and "*.bin" not in calls[0]
    (gpt2 / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        open_pretrained("hf:somebody/gpt2")
    assert "*.bin" in calls[-1]
    for name, says in (
        ("nobody/gpt2", "can't be had: 401 Client Error"),
        ("a/b/c", "hf:owner/name"),
    ):
        with pytest.raises(SettingsError, match=says):
            open_pretrained(f"hf:{name}")
    for name in ("no/such/place", "\0", "x" * 5000):
        with pytest.raises(SettingsError, match="there is no such folder"):
            open_pretrained(name)


def pickled_state(folder: Path, content: object) -> bytes:
    torch.save(content, folder / "made")
    return (folder / "made").read_bytes()


def hostile_folders(gpt2: Path, canary: Path) -> dict[str, dict[str, bytes | None]]:
    """Files to write into a folder (None: to take out), each of which spoils it."""
    weights = (gpt2 / "model.safetensors").read_bytes()
    cases: dict[str, dict[str, bytes | None]] = {
        f"weights: {kind}": {"model.safetensors": content}
        for kind, content in HOSTILE_TENSORS.items()
    }
    cases["weights: cut"] = {"model.safetensors": weights[: len(weights) // 2]}
    header = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(10**5)}
    text = json.dumps(header).encode()
    cases["weights: many"] = {"model.safetensors": len(text).to_bytes(8, "little") + text}
    for kind, content in hostile_json(50_000).items():
        for name in ("config.json", "tokenizer.json"):
            cases[f"{name}: {kind}"] = {name: content}
    for kind, vocab in (("a list", b"[]"), ("cut", b'{"a": 0, '), ("a word", b'{"a": "b"}')):
        older = {"tokenizer.json": None, "vocab.json": vocab, "merges.txt": b"#version\n"}
        cases[f"vocab.json: {kind}"] = older
    cases["merges.txt: odd"] = older | {"vocab.json": b"{}", "merges.txt": b"a b c\n"}
    cases["config.json: long"] = {"config.json": b" " * 10_000_000}
    cases["tokenizer.json: 10 million lists"] = {"tokenizer.json": b"[" + b"[]," * 10_000_000}
    state = torch.load(gpt2 / "state.pt")
    made = functools.partial(pickled_state, canary.parent)
    for kind, content in (
        ("code", made(state | {"x": Canary(canary)})),
        ("only code", pickle.dumps(Canary(canary))),
        ("before torch 1.6", pickle.dumps(state)),
        ("expanded", made(state | {"wte.weight": torch.zeros(1, 1).expand(2**20, 2**20)})),
        ("sparse", made({"wte.weight": torch.eye(3).to_sparse()})),
        ("a list", made([torch.zeros(3)])),
        ("cut", made(state)[:-300]),
    ):
        cases[f"pickle: {kind}"] = {"model.safetensors": None, "pytorch_model.bin": content}
    for kind, places in (
        ("outside", {"wte.weight": "../model.safetensors"}),
        ("a number", {"wte.weight": 1}),
        ("itself", {"wte.weight": "model.safetensors.index.json"}),
        ("absent", {f"{i}": f"{i}.safetensors" for i in range(20_000)}),
        ("nothing", {}),
        ("none", None),
    ):
        index = json.dumps({"weight_map": places}).encode()
        cases[f"index: {kind}"] = {
            "model.safetensors": None,
            "model.safetensors.index.json": index,
        }
    return cases


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="Linux tells the peak")
def test_damaged_and_hostile_folders_are_refused_at_once_and_run_nothing(gpt2, tmp_path):
    canary = tmp_path / "canary"
    torch.save(dict(their_model("gpt2").state_dict()), gpt2 / "state.pt")

    def refuse_all() -> None:
        gc.freeze()  # what other tests have left
        cases = hostile_folders(gpt2, canary)
        Path("/proc/self/clear_refs").write_text("5")
        before_all = status_of_this_process("VmHWM")
        for case, files in cases.items():
            before = {name: (gpt2 / name).read_bytes() for name in files if (gpt2 / name).exists()}
            for name, content in files.items():
                (gpt2 / name).unlink(missing_ok=True)
                if content is not None:
                    (gpt2 / name).write_bytes(content)
            began_at = time.process_time()
            with pytest.raises(PipelineError) as caught:
                open_folder(gpt2)
            assert time.process_time() - began_at < 1, case
            assert status_of_this_process("VmHWM") - before_all < 200e6, case
            assert len(str(caught.value).splitlines()) <= 4, case
            for name in files:
                (gpt2 / name).unlink(missing_ok=True)
            for name, content in before.items():
                (gpt2 / name).write_bytes(content)
            assert not canary.exists(), case

    open_folder(gpt2)
    assert os.waitpid(forked(refuse_all), 0)[1] == 0  # where no other test's memory is free
