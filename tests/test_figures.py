"""Figures that are promised for real texts."""

import pytest

from text.tokenizer import GPT2Tokenizer, train_bpe


@pytest.mark.parametrize(("vocab_size", "most"), [(4096, 0.95), (8192, 0.87)])
def test_a_trained_bpe_takes_less_than_a_token_a_chinese_character(
    shared_data, tmp_path, vocab_size, most
):
    transformers = pytest.importorskip("transformers")
    text = (shared_data / "ci.txt").read_text(encoding="utf-8")
    cut = int(len(text) * 0.9)
    tokenizer = train_bpe([text[:cut]], vocab_size)
    held_out = text[cut:]
    ids = tokenizer.encode(held_out)
    assert tokenizer.vocab_size == vocab_size
    assert len(ids) / len(held_out) <= most
    assert len(GPT2Tokenizer().encode(held_out)) / len(held_out) > 2
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_json(), encoding="utf-8")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    assert fast(held_out)["input_ids"] == ids
