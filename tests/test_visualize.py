"""The picture of a run: always a readable PNG, whatever the losses were."""

import io
import math
import sys
import warnings

import numpy as np
import pytest
from matplotlib import image

from visualize import render_losses


def render(**changes) -> bytes | None:
    """The picture of a small run, with every warning an error."""
    run = {"train_losses": [10.8, 7.0, 5.5], "val_losses": [10.8, 7.2, 6.1], "steps": [0, 4, 8]}
    run |= {"batch_losses": [10.8, 9.6, 8.1, 7.4, 6.9, 6.4, 6.0, 5.6], "best": 2}
    run |= {"vocab_size": 50_257, "title": "a-run"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return render_losses(**run | changes)


def pixels(png: bytes) -> np.ndarray:
    """(height, width, channels), each from 0 to 1."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    return image.imread(io.BytesIO(png), format="png")


ONE_EVALUATION = {"train_losses": [0.0], "val_losses": [0.0], "batch_losses": [], "steps": [0]}
THOUSANDS = {"batch_losses": [math.exp(-i / 900) * 10 for i in range(5000)], "steps": [0, 9, 5000]}
IDENTICAL = {"train_losses": [0.6] * 3, "val_losses": [0.6] * 3, "batch_losses": [0.6] * 30}
ENORMOUS = {"batch_losses": [1000.0, 900.0], "train_losses": [1e3] * 3, "val_losses": [1e3] * 3}
RUNS = {
    "one evaluation at 0, no title": ONE_EVALUATION | {"best": 0, "title": ""},
    "thousands of batches, Chinese title": THOUSANDS | {"title": "春江潮水"},
    "identical losses, two tokens": IDENTICAL | {"vocab_size": 2},
    "losses past every tick, formula as title": ENORMOUS | {"title": "$\\b^$ _{"},
}


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_every_run_gives_a_picture_of_readable_size_without_a_warning(run):
    assert_readable(pixels(render(**RUNS[run])))


def assert_readable(picture: np.ndarray) -> None:
    height, width = picture.shape[:2]
    assert 400 <= height < width <= 2500
    is_white = (picture[..., :3] == 1).all(axis=-1)
    assert 0.5 < is_white.mean() < 0.99  # drawn upon, and not painted over
    for half in (slice(0, width // 2), slice(width // 2, width)):
        assert not is_white[:, half].all()


def holds_colour(picture: np.ndarray, red: float, green: float, blue: float) -> bool:
    return bool((np.abs(picture[..., :3] - (red, green, blue)) < 0.02).all(axis=-1).any())


def test_the_picture_shows_the_losses_it_was_given_evaluations_left_and_batches_right():
    picture, other = pixels(render()), pixels(render(val_losses=[10.8, 7.2, 5.9]))
    assert_readable(picture)
    left, right = np.array_split(picture, 2, axis=1)
    other_left, other_right = np.array_split(other, 2, axis=1)
    assert not np.array_equal(other_left, left) and np.array_equal(other_right, right)
    blue, orange, star, green = (
        tuple(int(code[i : i + 2], 16) / 255 for i in (0, 2, 4))
        for code in ("1f77b4", "ff7f0e", "d62728", "2ca02c")
    )
    for colour in (blue, orange, star):
        assert holds_colour(left, *colour)
        assert not holds_colour(right, *colour)
    assert holds_colour(right, *green)
    assert not holds_colour(left, *green)


def test_without_matplotlib_there_is_no_picture(monkeypatch):
    for name in list(sys.modules):
        if name.partition(".")[0] == "matplotlib":
            monkeypatch.setitem(sys.modules, name, None)  # importing it is an ImportError
    assert render() is None
