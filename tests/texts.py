"""The samples, and a tokenizer from elsewhere that has learnt a text."""

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tests.conftest import REPOSITORY
from text.tokenizer_file import byte_symbols

ENGLISH, CHINESE = (
    (REPOSITORY / "corpus" / f"sample-{code}.txt").read_bytes().decode() for code in ("en", "zh")
)


def train_in_the_library(text: str, size: int, *special_tokens: str) -> tokenizers.Tokenizer:
    """A byte-level BPE as others train it, its special tokens first."""
    trainable = tokenizers.Tokenizer(models.BPE())
    trainable.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainable.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(byte_symbols()),
        show_progress=False,
    )
    trainable.train_from_iterator([text], trainer)
    return trainable
