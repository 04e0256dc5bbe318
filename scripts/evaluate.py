"""Score texts with trained models:  python -m scripts.evaluate my_text.txt --run one --run two

Each token is predicted from the text before it, of which the model sees at least half a context;
only the first tokens have less. So a run's own validation text gets the figures of its summary,
where the weights are those of the summary's weights_of_step. Of conversations, which the model's
chat template writes down, the answers alone are scored. Bits a byte compare models of any
tokenizer, the loss and the perplexity only those of one.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from engine.starting import end_at_ctrl_c

if __name__ == "__main__":
    end_at_ctrl_c()

import numpy as np
from torch.utils.data import DataLoader

from data import (
    PackedWindows,
    WindowDataset,
    as_batch,
    evaluation_loader,
    measure_tokens,
    to_array,
)
from engine.console import count_off, tell
from engine.errors import DataError, SettingsError
from engine.metrics import Score, TokenSize
from engine.precision import PRECISIONS, Precision, choose_precision
from exchange.saved_run import LoadedModel
from scripts.options import (
    add_device_option,
    add_model_options,
    describe,
    models_of,
    new_parser,
    open_model,
    run_program,
    to_json_line,
    write,
)
from storage.cache import usable_cache
from text.chat import Conversation
from text.chat_template import template_of
from text.chat_tokens import require_answers, writer_of
from text.documents import (
    DataSpec,
    Part,
    ReadingReport,
    each_document,
    has_conversations,
    read_documents,
)
from text.packing import cut_pieces, pack
from text.sources import find_parts, parse_data
from text.token_cache import encode_documents, encoders
from text.tokenizer import Tokenizer, encode_from_start
from training.learner import mean_loss

LONGEST_CONTEXT = 2048  # unless --context sets another; attention takes ever longer
TOKENS_AT_ONCE = 8192  # of a forward pass
READING = ("field", "encoding", "separator")  # names of DATA that are options here
COLUMNS = {
    "tokens": ",",
    "loss": ".4f",
    "perplexity": ",.3f",
    "bits_per_character": ".4f",
    "bits_per_byte": ".4f",
}


Scored = tuple[int | None, int, Score]  # a Row's document, its tokens, and what they score


@dataclass(frozen=True)
class Document:
    """A conversation's or a text's tokens, (N,), and which of them are scored, (N,) bool."""

    ids: np.ndarray
    is_target: np.ndarray
    is_text: bool


@dataclass(frozen=True)
class Row:
    """What a model scores on a text, or on one of its documents."""

    model: str
    text: str
    document: int | None  # from 1; None: the whole text
    context: int  # the most tokens that the model sees, the predicted one not counted
    tokens: int  # that were predicted
    loss: float  # nats a token
    perplexity: float
    bits_per_character: float
    bits_per_byte: float


def main() -> int:
    """Read the options, score each text with each model and print a table; returns 0."""
    arguments = _parser().parse_args()
    specs = {text: _spec(text, arguments) for text in arguments.texts}
    if arguments.context is not None and arguments.context < 1:
        raise SettingsError(f"--context is {arguments.context}; it must be 1 or more")
    named = models_of(arguments)
    table = None
    for one in named:
        model = open_model(one, arguments, weights="fp32")
        tell(describe(model))
        name = one.where or model.name
        if table is None:
            names = [name, *(other.where or "" for other in named)]
            table = Table(names, arguments.texts, as_json=arguments.json)
        yardstick = Yardstick(model, arguments.context, arguments.precision)
        for text, spec in specs.items():
            for row in yardstick.rows(name, text, spec, apart=arguments.documents):
                table.write(row)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    parser.add_argument(
        "texts",
        metavar="TEXT",
        nargs="+",
        help="what DATA takes: a file, a folder, a corpus, an address, a dataset",
    )
    group = parser.add_argument_group("the models, each --run or --model one (newest finished run)")
    add_model_options(group)
    add_device_option(group)
    group = parser.add_argument_group("how it is read")
    group.add_argument(
        "--documents",
        action="store_true",
        help="score each document by itself, behind the token that begins documents (if there is "
        "none, an end-of-text), and all of them together",
    )
    for name in READING:
        group.add_argument(f"--{name}", help=f'as DATA["{name}"]')
    group.add_argument(
        "--context",
        metavar="N",
        type=int,
        help=f"tokens that a model sees at most (its own context, at most {LONGEST_CONTEXT:,})",
    )
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="of the matrix products (the fastest here, as in training)",
    )
    group.add_argument("--json", action="store_true", help="a JSON object a line")
    return parser


def _spec(text: str, arguments: argparse.Namespace) -> DataSpec:
    given = {name: getattr(arguments, name) for name in READING}
    return parse_data({"path": text} | {n: value for n, value in given.items() if value})


class Table:
    """Rows in columns, or as lines of JSON; written one by one."""

    def __init__(self, models: list[str], texts: list[str], *, as_json: bool) -> None:
        self._as_json = as_json
        self._widths = {"model": max(map(len, ["model", *models]))}
        # room for the number of a document
        self._widths["text"] = max(map(len, ["text", *texts])) + 6
        if not as_json:
            self._write_line({name: name.replace("_per_", "/") for name in COLUMNS})

    def write(self, row: Row) -> None:
        """Write a row to standard output."""
        if self._as_json:
            write(to_json_line(asdict(row)))
            return
        text = row.text if row.document is None else f"{row.text} {row.document}"
        figures = {name: format(getattr(row, name), form) for name, form in COLUMNS.items()}
        self._write_line(figures, row.model, text)

    def _write_line(
        self, figures: dict[str, str], model: str = "model", text: str = "text"
    ) -> None:
        names = f"{model:<{self._widths['model']}}  {text:<{self._widths['text']}}"
        write(names + "".join(f"{figure:>16}" for figure in figures.values()) + "\n")


class Yardstick:
    """Scores texts with a model, in windows that overlap by half a context."""

    def __init__(self, model: LoadedModel, context: int | None, precision: str) -> None:
        self._model = model
        longest = model.model.config.context_length
        if context is not None and context > longest:
            raise SettingsError(
                f"--context is {context:,}; the context of {model.source} is {longest:,}"
            )
        self._context = context or min(longest, LONGEST_CONTEXT)
        self._precision: Precision = choose_precision(precision, model.device)

    def rows(self, model: str, text: str, spec: DataSpec, *, apart: bool) -> Iterator[Row]:
        """The row of a text; with `apart` first one for each of its documents."""
        report = ReadingReport()
        parts = find_parts(spec.train, usable_cache(), report)
        if has_conversations(parts, spec):
            documents = read_conversations(text, parts, spec, report, self._model)
            found = self._score_conversations(text, documents, apart=apart)
        else:
            ids, ends = read_tokens(text, parts, spec, report, self._model.tokenizer)
            found = self._score_texts(text, ids, ends, apart=apart)
        for document, n_tokens, score in found:
            figures = {name: getattr(score, name) for name in COLUMNS if name != "tokens"}
            yield Row(model, text, document, self._context, n_tokens, **figures)

    def _score_texts(
        self, text: str, ids: np.ndarray, ends: list[int], *, apart: bool
    ) -> Iterator[Scored]:
        if not apart:
            if len(ids) < 2:
                raise DataError(f"{text} is a single token; there is nothing before it to score.")
            yield None, len(ids) - 1, self.score(ids)
            return
        end_of_text = np.array([self._model.tokenizer.end_of_text_id], dtype=ids.dtype)
        ids = np.concatenate((end_of_text, ids))  # one before each document
        scores, counts = [], np.diff([0, *ends]) - (np.arange(len(ends)) > 0)
        counts -= len(self._model.tokenizer.begin_ids)  # then that is what a document is behind
        for number, (end, count) in enumerate(zip(ends, counts.tolist(), strict=True), start=1):
            scores.append(self.score(ids[end - count : end + 1]))
            yield number, count, scores[-1]
        yield None, sum(counts.tolist()), mean_score(scores, counts)

    def _score_conversations(
        self, text: str, documents: list[Document], *, apart: bool
    ) -> Iterator[Scored]:
        windows = self._pack(documents)
        if not len(windows):
            raise DataError(
                f"no answer in {text} ends within {self._context:,} tokens, which the model sees.\n"
                "Shorten the conversations, or set a larger --context."
            )
        if n_cut := windows.pieces.n_cut + windows.pieces.n_left_out:
            tell(
                f"Note: {n_cut:,} conversation{'s' * (n_cut != 1)} of {text} longer than "
                f"{self._context:,} tokens: only answers that end within them are scored"
            )
        if not apart:
            yield None, windows.count_targets(range(len(windows))), self._score_packed(windows)
            return
        scores, counts = [], []
        for number, document in enumerate(documents, start=1):
            if not len(windows := self._pack([document])):
                continue
            counts.append(windows.count_targets(range(len(windows))))
            scores.append(self._score_packed(windows))
            yield number, counts[-1], scores[-1]
        yield None, sum(counts), mean_score(scores, np.array(counts))

    def _pack(self, documents: list[Document]) -> PackedWindows:
        """Windows of documents as training has them."""
        starts = np.cumsum([0, *(len(document.ids) for document in documents)])[:-1]
        is_target = np.concatenate([document.is_target for document in documents])
        is_text = np.array([document.is_text for document in documents])
        pieces = cut_pieces(starts, is_target, self._context, is_text=is_text)
        ids = np.concatenate([document.ids for document in documents])
        return PackedWindows(ids, is_target, pieces, pack(pieces.lengths, self._context, 0))

    def score(self, ids: np.ndarray) -> Score:
        """The Score of tokens, (N,), but the first one."""
        size = measure_tokens(ids, self._model.tokenizer, [(1, len(ids))])
        return self._score(WindowDataset(ids, self._context, self._context), size)

    def _score_packed(self, windows: PackedWindows) -> Score:
        size = measure_tokens(windows.scored_tokens(), self._model.tokenizer)
        return self._score(windows, size)

    def _score(self, windows: WindowDataset | PackedWindows, size: TokenSize) -> Score:
        at_once = max(1, TOKENS_AT_ONCE // self._context)
        loader = DataLoader(windows, batch_size=at_once, collate_fn=as_batch)
        parts = evaluation_loader(loader)
        counted = count_off(parts, len(parts), "Evaluating")
        loss = mean_loss(self._model.model, counted, self._model.device, self._precision)
        return Score(loss, size, len(parts), len(parts))


def read_tokens(
    text: str, parts: list[Part], spec: DataSpec, report: ReadingReport, tokenizer: Tokenizer
) -> tuple[np.ndarray, list[int]]:
    """A text's tokens, (N,), an end-of-text between two documents; and where each document ends.

    Raises what reading raises, and DataError for a text without any.
    """
    pieces, ends, n_tokens = [], [], 0
    with encoders() as pool:
        for batch in encode_documents(read_documents(parts, spec, report), tokenizer, pool):
            pieces.append(batch.ids)
            for n_ids, _, is_last in batch.chunks:
                n_tokens += n_ids
                if is_last:
                    ends.append(n_tokens)
    _require_any(ends, text, report)
    return np.concatenate(pieces), ends


def read_conversations(
    text: str, parts: list[Part], spec: DataSpec, report: ReadingReport, model: LoadedModel
) -> list[Document]:
    """The conversations of a file by the model's chat template, and the texts among them.

    Raises what reading raises, and DataError for a model without a template, and for a file without
    any conversation.
    """
    if model.chat_template is None:
        raise DataError(
            f"{text} has conversations, and {model.source} has no chat template to write them down "
            "by.\nScore them with a model that was trained on conversations, or name the field "
            "that holds a text: --field answer."
        )
    tokenizer, found = model.tokenizer, []
    template = template_of(model.chat_template, tokenizer)
    require_answers(template, tokenizer)
    for document in each_document(parts, spec, report, writer_of(template, tokenizer)):
        if isinstance(document, Conversation):
            assert document.written is not None, "each_document() writes them down"
            ids, is_target = document.written.encode()
            found.append(Document(to_array(ids, tokenizer.vocab_size), np.array(is_target), False))
        elif (content := "".join(document)).strip():
            ids = [*encode_from_start(tokenizer, content), tokenizer.end_of_text_id]
            is_target = [True] * len(ids)
            found.append(Document(to_array(ids, tokenizer.vocab_size), np.array(is_target), True))
    _require_any(found, text, report)
    return found


def _require_any(documents: Sequence[Any], text: str, report: ReadingReport) -> None:
    """Tell what reading has noted; DataError if there is nothing to score."""
    for notice in (*report.notices, *report.notes):
        tell(f"Note: {notice.en}")
    if not documents:
        what = "has no row with an answer" if report.unanswered else "is empty"
        raise DataError(f"{text} {what}.\nName a text to score.")


def mean_score(scores: list[Score], counts: np.ndarray) -> Score:
    """The Score of several texts together, with the numbers of their tokens that were scored."""
    batches = sum(score.n_batches for score in scores)
    loss, characters, n_bytes = (
        np.average(values, weights=counts).item()
        for values in zip(*((s.loss, s.size.characters, s.size.bytes) for s in scores), strict=True)
    )
    return Score(loss, TokenSize(characters, n_bytes), batches, batches)


if __name__ == "__main__":
    run_program(main, "Set a smaller --context.")
