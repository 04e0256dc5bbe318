"""The benchmark of fine-tuning divides texts without a loss."""

import pytest

from benchmarks.finetune import write_paragraphs


def test_paragraphs_are_shuffled_by_a_seed_and_none_is_lost(tmp_path):
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    for name, first in (("a.md", 0), ("deep/b.md", 20)):
        text = "\n\n".join(f"paragraph {n}" for n in range(first, first + 20))
        (tmp_path / "texts" / name).write_text(text, encoding="utf-8")
    (tmp_path / "texts" / "c.txt").write_text("of another kind", encoding="utf-8")
    parts = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        write_paragraphs([tmp_path / "texts"], folder)
        parts.append([(folder / f"{name}.md").read_text("utf-8") for name in ("train", "val")])
    assert parts[0] == parts[1]
    train, val = (part.strip().split("\n\n") for part in parts[0])
    assert (len(train), len(val)) == (36, 4)
    assert sorted(train + val) == sorted(f"paragraph {n}" for n in range(40))
    assert train != sorted(train, key=lambda words: int(words.split()[1]))
    with pytest.raises(SystemExit, match=r"there is no \.md file"):
        write_paragraphs([tmp_path / "one" / "none"], tmp_path)
