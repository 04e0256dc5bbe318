"""A tiny chat model whose answers a test chooses, and ChatML's tokens written out by hand."""

from types import SimpleNamespace

import pytest
import torch

import generation
from generation import SamplingConfig, stream_text
from tests.letters import model_for
from text.chat_template import CHATML
from text.tokenizer import CharTokenizer

TEXT = "The ferry crossed the river at dawn. Its bell rang twice, and nobody came.\n"
CONTEXT = 256  # in characters
BEGIN, END = "<|im_start|>", "<|im_end|>"


def chat_model() -> SimpleNamespace:
    """What load() gives of a chat model: of characters, with ChatML's tokens."""
    tokenizer = CharTokenizer(TEXT + "systemuassistant").adding([BEGIN, END])
    model = model_for(tokenizer, 0.3, emb_dim=16, n_heads=2, context_length=CONTEXT)
    facts = {"name": "tiny", "version": "step 1", "source": "tiny, step 1", "weights": "fp32"}
    facts |= {"why_weights": None, "path": None, "step": None, "settings": {}, "n_parameters": 5}
    return SimpleNamespace(
        model=model.eval(),
        tokenizer=tokenizer,
        device=torch.device("cpu"),
        chat_template=CHATML.source,
        sampling=SamplingConfig(),
        **facts,
    )


def ids_of(tokenizer: CharTokenizer, *turns: str, is_open: bool = False) -> list[int]:
    """The ids of turns such as "user\\nHi", and of the beginning of an answer.

    With is_open the last turn is an answer without its end.
    """
    begin, end = (tokenizer.special_tokens[name] for name in (BEGIN, END))
    ids = []
    for turn in turns:
        ids += [begin, *tokenizer.encode(turn), end, *tokenizer.encode("\n")]
    return ids[:-2] if is_open else [*ids, begin, *tokenizer.encode("assistant\n")]


class Answers:
    """Takes the place of stream_text(): draws what a test wants, and notes what it was asked."""

    def __init__(self) -> None:
        self.coming: list[str] = []  # with none left the answer is "ok"
        self.asked: list[dict] = []

    def __call__(self, model, tokenizer, prompts, **options):
        text = self.coming.pop(0) if self.coming else "ok"
        self.asked.append(options | {"prompt": prompts[0]})
        script = [*tokenizer.encode(text), tokenizer.special_tokens[END]]
        drawn = iter(script)
        n_rows = options.get("num_samples", 1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                generation, "choose_next", lambda *_, **__: torch.tensor([[next(drawn)]] * n_rows)
            )
            yield from stream_text(model, tokenizer, prompts, **options)
