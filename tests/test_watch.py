"""Watching runs: curves of any length, the page's endpoints and their guard, a stop, a browser."""

import contextlib
import http.client
import json
import math
import os
import random
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

import environment
from insight.report import Report
from insight.verdict import change_lines, headline
from planning.card import card_rows
from scripts import watch
from scripts.serving import app as serving
from scripts.serving.guard import to_json
from scripts.watching import app as watching
from scripts.watching import curves
from scripts.watching.curves import Curve, Metrics, Sent
from scripts.watching.runs import Runs
from storage.files import STOP, FolderLock
from tests import by_heart
from tests.launching import Program, launching, wait_until
from tests.records import plan_in_minutes, record_of
from tests.serving import continued
from tests.test_page import CHROMIUM, CONTRAST, HOSTILE
from training.journal import ENDED, Moment, _as_section
from training_utils import TrainingConfig

TOKEN = "open-sesame"


def row(step: int, **values) -> dict:
    return {"step": step} | {name.replace("_", "/", 1): value for name, value in values.items()}


def lines_of(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


# --------------------------------------------------------------------------------- curves


def test_a_curve_keeps_the_mean_and_the_range_of_all_steps_in_few_points(monkeypatch):
    monkeypatch.setattr(curves, "MOST_POINTS", 10)
    values = [random.Random(1).random() for _ in range(1, 334)]
    curve = Curve()
    for step, value in enumerate(values, start=1):
        curve.add(step, value)
        assert len(curve.points) <= 10
    width = curve.width
    assert width == 64  # 333 steps in at most ten parts of a power of two
    parts = {}
    for step, value in enumerate(values, start=1):
        parts.setdefault(step // width, []).append((step, value))
    found = curve.to_json()
    assert [step for step, *_ in found] == [part[-1][0] for part in parts.values()]
    for (_, *numbers), part in zip(found, parts.values(), strict=True):
        own = [value for _, value in part]
        assert numbers == pytest.approx([sum(own) / len(own), min(own), max(own)], rel=1e-5)
    assert curve.last == pytest.approx(sum(own) / len(own))


class Reader:
    """What the page does with the news of a Metrics."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics, self.sent, self.points = metrics, Sent(), {}
        self.n_points = 0  # that were sent

    def look(self) -> None:
        self.metrics.read()
        news, self.sent = self.metrics.news(self.sent)
        for name, part in news.items():
            self.n_points += len(part["points"])
            self.points[name] = self.points.get(name, [])[: part["from"]] + part["points"]
        for name, curve in self.metrics.curves.items():
            assert self.points.get(name, []) == curve.to_json(), name


def test_a_file_is_read_as_it_grows_wherever_its_lines_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "MOST_POINTS", 6)
    rows = [row(0, val_loss=4.0), *(row(n, train_loss=4 - n / 10) for n in range(1, 21))]
    rows.insert(11, row(10, val_loss=3.5, train_tok_per_sec=5e3))
    content, path = lines_of(rows), tmp_path / "metrics.jsonl"
    whole = Reader(Metrics(path))
    whole.look()  # there is no file yet
    path.write_bytes(content)
    whole.look()
    assert whole.points["val/loss"] == [[0, 4.0, 4.0, 4.0], [10, 3.5, 3.5, 3.5]]
    assert whole.metrics.step == 20
    for cut in range(1, len(content), 7):
        path.write_bytes(b"")
        reader = Reader(Metrics(path))
        for start in range(0, len(content), cut):
            with open(path, "ab") as file:
                file.write(content[start : start + cut])
            reader.look()
        assert reader.points == whole.points


def test_only_what_is_new_is_sent(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines_of([row(n, train_loss=3.0) for n in range(1, 501)]))
    reader = Reader(Metrics(path))
    reader.look()
    assert reader.n_points == 500
    reader.look()
    assert reader.n_points == 500
    with open(path, "ab") as file:
        file.write(lines_of([row(501, train_loss=3.0)]))
    reader.look()
    assert reader.n_points == 502  # the last point, which might have grown, and the new one


@pytest.mark.parametrize("way", ["replaced", "cut", "rewound"])
def test_a_run_that_goes_on_from_a_checkpoint_takes_its_later_points_back(tmp_path, way):
    path = tmp_path / "metrics.jsonl"
    first = [row(n, train_loss=3.0) for n in range(1, 31)]
    path.write_bytes(lines_of(first))
    reader = Reader(Metrics(path))
    reader.look()
    again = [row(n, train_loss=2.0) for n in range(21, 26)]
    if way == "replaced":  # as storage.tracking does it
        (tmp_path / "beside").write_bytes(lines_of(first[:20] + again))
        os.replace(tmp_path / "beside", path)
    elif way == "cut":
        path.write_bytes(lines_of(first[:20] + again))
    else:
        with open(path, "ab") as file:
            file.write(lines_of(again))
    reader.look()
    found = reader.points["train/loss"]
    assert [step for step, *_ in found] == list(range(1, 26))
    assert [mean for _, mean, *_ in found] == [3.0] * 20 + [2.0] * 5


def test_lines_that_are_damaged_or_none_of_ours_are_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr("insight.curves.MOST_LINE_BYTES", 1000)
    monkeypatch.setattr("insight.curves.BLOCK_BYTES", 300)
    odd = [b"", b"{", b"[]", b"7", b"null", b"\xff\xfe", b'{"step": "1", "train/loss": 1}']
    odd += [b'{"step": 1e3, "train/loss": 1}', b'{"step": -1, "train/loss": 1}']
    odd += [b'{"step": 1' + b"0" * 40 + b', "train/loss": 1}', b"[" * 900]
    odd += [b'{"step": 3, "train/loss": %s}' % v for v in (b"NaN", b"null", b'"x"', b"true", b"[]")]
    odd += [b'{"step": 3, "train/loss": 1' + b"0" * 400 + b"}", b"{" * 5000]
    good = lines_of([row(n, train_loss=float(n)) for n in (3, 4)])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join(odd) + b"\n" + good + b'{"step": 5, "tra')
    reader = Reader(Metrics(path))
    reader.look()
    assert reader.points["train/loss"] == [[3, 3.0, 3.0, 3.0], [4, 4.0, 4.0, 4.0]]


@pytest.mark.slow
def test_a_hundred_thousand_steps_become_an_event_of_a_few_hundred_kilobytes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    names = ("train/loss", "train/grad_norm", "train/lr")
    rows = (
        {"step": n} | {m: 1 + math.sin(n * (i + 1)) for i, m in enumerate(names)}
        for n in range(1, 100_001)
    )
    with open(path, "w", encoding="utf-8") as file:
        for number, values in enumerate(rows):
            file.write(json.dumps(values) + "\n")
            if number % 100 == 0:
                file.write(json.dumps({"step": number + 1, "val/loss": 3.0}) + "\n")
    metrics = Metrics(path)
    metrics.read()
    news, _ = metrics.news(Sent())
    assert metrics.step == 100_000
    assert all(400 < len(news[name]["points"]) <= 1000 for name in names)
    assert len(json.dumps(news)) < 300_000


# ----------------------------------------------------------------------------- the server


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return by_heart.tiny_run(tmp_path_factory)


@pytest.fixture
def runs(tmp_path, tiny) -> Path:
    """A folder with a finished run, one that has saved nothing, and what is no run."""
    folder = tmp_path / "runs"
    shutil.copytree(tiny, folder / "tiny")
    # what the run had time to measure depends on the processor
    Report(folder / "tiny").note({"repeated": 1.0, "leaked": 0.57})
    not_yet = shutil.ignore_patterns("*best*", "summary*", "checkpoints")
    shutil.copytree(folder / "tiny", folder / "young", ignore=not_yet)
    (folder / "empty").mkdir()
    return folder


class Watcher:
    """scripts.watch in a thread, on a port that was free, and a client of it."""

    def __init__(self, folder: Path, *options: str, token: str | None = TOKEN) -> None:
        started, real = threading.Event(), serving.Server

        def note(application, watch, greeting):
            self.greeting, self.watch = greeting, watch
            self._uvicorn = real(application, watch, greeting)
            started.set()
            return self._uvicorn

        given = ["watch", "--port=0", "--runs", str(folder), *options]
        given += ["--token", token] if token else []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", given)
            patch.setattr(serving, "Server", note)
            self._thread = threading.Thread(target=watch.main, daemon=True)
            self._thread.start()
            assert started.wait(60)
        self.port = int(re.search(r":(\d+)/", self.greeting)[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.token = token or re.search(r"/#(\S+)", self.greeting)[1]

    def __enter__(self) -> "Watcher":
        return self

    def __exit__(self, *_: object) -> None:
        self._uvicorn.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()

    def ask(self, method: str, path: str, **options) -> requests.Response:
        headers = {"Authorization": f"Bearer {self.token}"} | options.pop("headers", {})
        return requests.request(method, self.url + path, headers=headers, timeout=60, **options)

    @contextlib.contextmanager
    def events(self, query: str = "") -> Iterator[Iterator[dict]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {"Authorization": f"Bearer {self.token}"}
        connection.request("GET", f"/events{query}", headers=headers)
        response = connection.getresponse()
        assert response.status == 200

        def read() -> Iterator[dict]:
            while line := response.readline():
                if line.startswith(b"data: "):
                    yield json.loads(line.removeprefix(b"data: "))

        try:
            yield read()
        finally:
            response.close()
            connection.close()


def until(events: Iterator[dict], found) -> dict:
    """The first event of which something is so."""
    return next(event for event in events if found(event))


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(watching, "EVERY_S", 0.05)
    monkeypatch.setattr("scripts.watching.runs.FRESH_S", 0.0)


def test_events_have_all_runs_and_of_the_chosen_one_what_it_does_while_it_does_it(runs):
    with Watcher(runs) as server:
        with server.events() as events:
            first = next(events)
            assert first.keys() == {"runs"}
            listed = {run.pop("name"): run for run in first["runs"]}
            assert listed.keys() == {"tiny", "young"}
            summary = json.loads((runs / "tiny" / "summary.json").read_text(encoding="utf-8"))
            tiny = {"state": "finished", "step": 180, "total": 180, "seconds_left": None}
            tiny |= {"loss": summary["final_val_loss"], "started": listed["tiny"]["started"]}
            assert listed["tiny"] == tiny
            assert listed["young"]["state"] == "stopped"
            with FolderLock(runs / "young"):
                lines = until(events, lambda e: e)["runs"]
                assert [r["state"] for r in lines if r["name"] == "young"] == ["training"]
        with server.events("?run=young") as events:
            run = next(events)["run"]
            rows = (runs / "young" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            losses = [json.loads(line).get("train/loss") for line in rows]
            points = run["curves"]["train/loss"]["points"]
            assert [mean for _, mean, *_ in points] == pytest.approx(
                [loss for loss in losses if loss is not None], rel=1e-5
            )
            assert run["weights"] is None
            assert run["bits_per_byte"] > 0
            assert ["model", "small (gpt2)"] in run["facts"]
            with open(runs / "young" / "metrics.jsonl", "ab") as file:
                file.write(lines_of([row(181, train_loss=1.25)]))
            news = until(events, lambda e: "curves" in e.get("run", {}))["run"]["curves"]
            assert news == {"train/loss": {"from": 179, "points": [points[-1], [181] + [1.25] * 3]}}
        streams = [server.events() for _ in range(2)]
        with pytest.MonkeyPatch.context() as patch, streams[0] as events:
            next(events)
            patch.setattr(watching, "MOST_STREAMS", 1)
            refused = server.ask("GET", "/events")
            assert (refused.status_code, "pages are open" in refused.text) == (429, True)
        with server.events() as events:  # open as the server ends, which does not wait for it
            next(events)
            server._uvicorn.should_exit = True
            server._thread.join(20)
            assert not server._thread.is_alive()


def test_without_the_token_or_from_another_site_nothing_is_told_or_stopped(runs):
    with Watcher(runs) as server, FolderLock(runs / "young"):
        for path in ("/", "/watch.js", "/watch.css", "/page.css", "/icon.svg"):
            answer = server.ask("GET", path, headers={"Authorization": ""})
            assert answer.status_code == 200
            assert "default-src 'none'" in answer.headers["content-security-policy"]
        stop = {"method": "POST", "path": "/stop", "json": {"run": "young"}}
        form = {"data": '{"run": "young"}', "headers": {"content-type": "text/plain"}, "json": None}
        for status, options in (
            (401, {"headers": {"Authorization": ""}}),
            (401, {"headers": {"Authorization": "Bearer wrong-sesame"}}),
            (403, {"headers": {"Host": "evil.example"}}),
            (403, {"headers": {"Origin": "http://evil.example"}}),
            (403, {"headers": {"Origin": "null"}}),
            (415, form),
            (405, {"method": "GET"}),
            (400, {"json": {"run": 5}}),
            (400, {"json": []}),
            (404, {"json": {"run": "empty"}}),
            (404, {"json": {"run": "../runs/young"}}),
            (404, {"json": {"run": str(runs / "young")}}),
            (404, {"json": {"run": ""}}),
            (404, {"json": {"run": "young\0"}}),
            (409, {"json": {"run": "tiny"}}),  # it does not train
        ):
            assert server.ask(**(stop | options)).status_code == status, options
        for method, path in (("GET", "/events"), ("POST", "/write?run=tiny")):
            assert server.ask(method, path, headers={"Authorization": ""}).status_code == 401
        assert not list(runs.glob(f"*/{STOP}"))
        answer = server.ask(**stop, headers={"Origin": server.url})
        assert (answer.status_code, answer.json()) == (200, {"stopping": "young"})
        assert (runs / "young" / STOP).read_bytes() == b""
        assert Runs(runs).find("young").state == "stopping"


def test_what_fails_unexpectedly_is_answered_and_printed_once(runs, monkeypatch, capsys):
    with Watcher(runs) as server:
        monkeypatch.setattr(Runs, "find", lambda self, name: 1 / 0)
        answer = server.ask("POST", "/stop", json={"run": "tiny"})
        assert (
            answer.status_code == 500 and "ZeroDivisionError" in answer.json()["error"]["message"]
        )
        assert server.ask("GET", "/").status_code == 200  # and what it had to print is printed
    assert "".join(capsys.readouterr()).count("ZeroDivisionError in") == 1


def test_a_run_that_was_asked_to_stop_is_stopping_until_its_process_ends(runs):
    run = Runs(runs).find("young")
    with FolderLock(runs / "young"):
        assert run.state == "training" and run.ask_to_stop()
        (runs / "young" / STOP).unlink()  # as the loop does before it saves
        assert run.state == "stopping"
    with FolderLock(runs / "young"):  # nobody has looked in between
        os.utime(runs / "young" / ".lock-owner.json", ns=(1, 1))  # however coarse the clock is
        assert run.state == "training"
        (runs / "young" / STOP).touch()  # a stop that was asked for elsewhere
        assert run.state == "stopping"
        (runs / "young" / STOP).unlink()
        assert run.state == "stopping"
    assert run.state == "stopped" and not run.ask_to_stop()


def test_a_token_is_made_where_none_is_given_and_is_in_the_address_that_is_printed(runs):
    with Watcher(runs, token=None) as server:
        assert re.fullmatch(r"[\w-]{22}", server.token)
        assert server.greeting.startswith(f"{server.url}/#{server.token} watches the runs in ")
        assert server.ask("GET", "/events?run=none").status_code == 404
        assert server.ask("GET", "/events", headers={"Authorization": ""}).status_code == 401


@pytest.mark.slow
def test_a_run_writes_with_its_newest_weights_and_says_so_where_it_has_none(runs):
    model = environment.load_run(runs / "tiny", device="cpu")
    body = {"prompt": "The ferry", "max_tokens": 12}
    with Watcher(runs) as server:
        expected = continued(model, "The ferry", max_new_tokens=12)
        for _ in range(2):
            answer = server.ask("POST", "/write?run=tiny", json=body)
            assert answer.json()["choices"][0]["text"] == expected
        streamed = server.ask("POST", "/write?run=tiny", json=body | {"stream": True})
        *events, done, _ = streamed.text.split("\n\n")
        parts = [json.loads(event.removeprefix("data: ")) for event in events]
        assert "".join(part["choices"][0]["text"] for part in parts) == expected
        assert done == "data: [DONE]"
        refused = server.ask("POST", "/write?run=young", json=body)
        assert (refused.status_code, "no weights yet" in refused.text) == (409, True)
        shutil.copytree(runs / "tiny" / "checkpoints", runs / "young" / "checkpoints")
        assert server.ask("POST", "/write?run=young", json=body).json()["model"] == "young"
        shutil.rmtree(runs / "young" / "checkpoints" / "step-00000180")
        (runs / "young" / "checkpoints" / "step-00000190").mkdir()
        damaged = server.ask("POST", "/write?run=young", json=body)
        assert (damaged.status_code, "can be used" in damaged.text) == (500, True)
        assert server.ask("POST", "/write?run=tiny", json=body).status_code == 200


def test_samples_and_the_diagnosis_are_those_of_the_report(runs):
    texts = ["## no heading\n\nStep 5\n    indented", f"one\n\n\ntwo {ENDED.en}"]
    section = _as_section(Moment("After epoch 1", 7, texts), {7: 2.5})
    (runs / "tiny" / "samples.md").write_text(f"# What\n\n{section}\n", encoding="utf-8")
    rows = [row(0, val_loss=4.0, eval_train_loss=4.0)]  # the validation loss rises to the end
    for n in range(1, 11):
        values = {"val_loss": 3 + abs(n - 3) / 4, "eval_train_loss": 4 - n / 3}
        rows += [row(18 * n, train_loss=4 - n / 3, train_tokens=1000 * n), row(18 * n, **values)]
    (runs / "tiny" / "metrics.jsonl").write_bytes(lines_of(rows))
    detail = Runs(runs).find("tiny").detail()
    summary = json.loads((runs / "tiny" / "summary.json").read_text(encoding="utf-8"))
    assert detail["bits_per_byte"] == summary["final_val_bits_per_byte"]
    label = {"en": "After epoch 1", "zh": "第 1 轮之后"}
    remarks = [None, {"en": ENDED.en, "zh": ENDED.zh}]
    texts[1] = "one\n\n\ntwo "
    assert detail["samples"] == [{"label": label, "step": 7, "texts": texts, "remarks": remarks}]
    run, findings = Report(runs / "tiny").read()
    assert findings
    assert detail["diagnosis"]["headline"] == headline(run, findings)._asdict()
    keys = ("severity", "confidence", "lines")
    assert [tuple(found[k] for k in keys) for found in detail["diagnosis"]["findings"]] == [
        (
            found.severity,
            found.confidence,
            [line._asdict() for line in change_lines(found.changes, run.facts)],
        )
        for found in findings
    ]
    assert [found["title"]["en"] for found in detail["diagnosis"]["findings"]] == [
        finding.title.en for finding in findings
    ]


def test_the_card_of_a_run_with_minutes_is_the_one_that_was_printed(tmp_path):
    training = TrainingConfig(batch_size=4, max_length=32, time_budget_minutes=1.0)
    record = record_of(plan_in_minutes(), training=training)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "settings.json").write_text(json.dumps(record.to_json()), encoding="utf-8")
    detail = Runs(tmp_path).find("one").detail()
    choice = record.choice
    rows = card_rows(choice.recipe, choice.text, choice.machine, 1.0)
    assert detail["card"] == [[label._asdict(), words._asdict()] for label, words in rows]
    assert ["batch", "4 x 32"] in detail["facts"]
    assert ["budget", "1m 0.0s"] in detail["facts"]
    assert (detail["state"], detail["step"], detail["loss"]) == ("stopped", 0, None)


def test_damaged_files_of_a_run_take_their_place_on_the_page_and_nothing_else(runs):
    for name in ("settings.json", "data.json", "summary.json", "samples.md", "metrics.jsonl"):
        (runs / "tiny" / name).write_bytes(b'{"files": [5, {}], \xff')
    (runs / "young" / "data.json").write_text('{"files": {"a": 1}}', encoding="utf-8")
    detail = Runs(runs).find("tiny").detail()
    assert (detail["facts"], detail["card"], detail["samples"], detail["total"]) == (
        [],
        [],
        [],
        None,
    )
    assert Runs(runs).find("young").detail()["text"] == []
    assert [run["name"] for run in Runs(runs).lines()] == [r.path.name for r in Runs(runs).all()]


def test_numbers_that_no_run_has_leave_the_other_runs_on_the_page(runs):
    shutil.copytree(runs / "tiny", runs / "sound")
    (runs / "tiny" / "summary.json").write_text(
        '{"steps": NaN, "final_val_loss": [1e999], "final_val_bits_per_byte": -1e999}'
    )
    (runs / "tiny" / "data.json").write_text('{"tokens": {"a": NaN}}')
    (runs / "tiny" / "samples.md").write_text(f"## One\n\nStep {'9' * 5000}\n\n    a\n")
    values = {"val_loss": 1.5, "val_bits_per_byte": 2.0, "train_lr": 1.7e308}
    (runs / "tiny" / "metrics.jsonl").write_bytes(lines_of([row(7, **values)]))
    content = json.loads((runs / "young" / "settings.json").read_text(encoding="utf-8"))
    content["total_steps"] = 10**300
    (runs / "young" / "settings.json").write_text(json.dumps(content))
    values = {"train_tokens": 10**17, "train_tok_per_sec": 1e-199}
    (runs / "young" / "metrics.jsonl").write_bytes(lines_of([row(7, **values)]))
    found = Runs(runs)
    sound = found.find("sound").line()
    assert sound["state"] == "finished" and sound["loss"] is not None
    with FolderLock(runs / "young"):
        by_name = {line["name"]: line for line in json.loads(to_json(found.lines()))}
    assert by_name["sound"] == sound
    assert by_name["young"]["state"] == "training"
    tiny = json.loads(to_json(found.find("tiny").detail()))
    assert (tiny["step"], tiny["loss"], tiny["bits_per_byte"]) == (7, 1.5, 2.0)
    assert tiny["text_tokens"] is None
    assert [(sample["step"], sample["texts"]) for sample in tiny["samples"]] == [(0, ["a"])]
    news, _ = found.find("tiny").news(Sent())
    assert to_json(news) and news["train/lr"]["points"] == []


def test_the_time_left_is_that_of_the_pace_which_is_seen_and_before_of_the_last_speed(
    runs, monkeypatch
):
    now = 1000.0
    monkeypatch.setattr("scripts.watching.runs.time.monotonic", lambda: now)
    path = runs / "young" / "metrics.jsonl"
    path.write_bytes(lines_of([row(80, train_loss=1.0, train_tokens=8000)]))
    with FolderLock(runs / "young"):
        run = Runs(runs).find("young")
        assert run.line()["seconds_left"] is None
        with open(path, "ab") as file:
            file.write(lines_of([row(80, val_loss=1.0, train_tok_per_sec=50.0)]))
        assert run.line()["seconds_left"] == 200.0  # a hundred steps of a hundred tokens
        now += 10
        with open(path, "ab") as file:
            file.write(lines_of([row(85, train_loss=1.0, train_tokens=8500)]))
        assert run.line()["seconds_left"] == 95 * 2.0
    assert run.line()["seconds_left"] is None


def test_what_the_options_must_be_is_said_for_all_of_them_at_once(monkeypatch):
    wrong = ["--port=x", "--host=0.0.0.0", "--device=gpu", "--allow-host=bad host"]
    monkeypatch.setattr(sys, "argv", ["watch", *wrong])
    with pytest.raises(watch.SettingsError) as caught:
        watch.main()
    said = str(caught.value)
    assert all(word in said for word in ("--port is 'x'", "needs --token", "--device is 'gpu'"))
    assert "--allow-host is 'bad host'" in said


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_the_stop_button_ends_a_real_run_as_ctrl_c_does(tmp_path):
    with launching(tmp_path) as start:
        program: Program = start(step_s=0.05)
        program.until_it_trains()
        with Watcher(tmp_path / "runs") as server:
            answer = server.ask("POST", "/stop", json={"run": "one"})
            assert answer.status_code == 200
            program.ends_with(130)
            assert "as the file named stop asks for" in program.err
            assert "The same command goes on from there" in program.err
            assert Runs(tmp_path / "runs").find("one").state == "stopped"
        again = start()
        again.ends_with(0)
        assert "Resuming runs/one" in again.out


# ---------------------------------------------------------------------------- the browser


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM:
        pytest.skip("there is no chromium on this machine")
    with api.sync_playwright() as playwright:
        # the sandbox of a browser does not work for root
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Opens a server's page; at the end nothing was asked of other hosts, and nothing was wrong."""
    asked, wrong, contexts = [], [], []

    def open_page(server: Watcher, **options):
        context = browser.new_context(**{"locale": "en-US"} | options)
        contexts.append(context)
        context.set_default_timeout(120_000)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda m: m.type in ("error", "warning") and wrong.append(m.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.goto(f"{server.url}/#{server.token}")
        page.wait_for_selector("#loss svg path.line")
        return page

    expected = open_page.expected = []  # what a test may find in the console
    yield open_page
    for context in contexts:
        context.close()
    hosts = {re.sub(r"^(\w+://[^/]*).*", r"\1", url) for url in asked}
    assert len(hosts) == 1
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", *hosts)
    assert [text for text in wrong if not any(part in text for part in expected)] == []


@pytest.mark.slow
def test_the_page_shows_a_run_as_it_trains_writes_with_it_and_stops_it_by_keyboard(runs, open_page):
    shutil.copytree(runs / "tiny" / "checkpoints", runs / "young" / "checkpoints")
    with FolderLock(runs / "young"), Watcher(runs) as server:
        page = open_page(server)
        assert page.locator("#name").inner_text() == "young"  # the one that trains
        page.locator("#findings", has_text="% sure").wait_for()  # the page asks for them later
        assert page.locator("#findings pre").first.inner_text().startswith("DATA = ")
        assert "trains · step 180 of 180" in page.locator("#about").inner_text()
        assert page.title() == "young: trains"
        with open(runs / "young" / "metrics.jsonl", "ab") as file:
            file.write(lines_of([row(200, train_loss=1.25)]))
        page.get_by_text("step 200 · training 1.25").wait_for()
        loss = page.locator("#loss svg")
        loss.hover(position={"x": 300, "y": 100})
        hovered = page.locator("#loss .readout").inner_text()
        assert re.match(r"step \d+ · training \d", hovered)
        assert not hovered.startswith("step 200")
        loss.focus()
        page.keyboard.press("Home")
        assert page.locator("#loss .readout").inner_text().startswith("step 0 ·")
        page.keyboard.press("End")
        page.keyboard.press("ArrowLeft")
        assert page.locator("#loss .readout").inner_text().startswith("step 180 ·")
        page.locator("#prompt").fill("The ferry")
        page.locator("#go").focus()
        page.keyboard.press("Enter")
        model = environment.load_run(runs / "tiny", which="last", device="cpu")
        written = "The ferry" + continued(model, "The ferry", max_new_tokens=120)
        wait_until(lambda: page.locator("#written").text_content() == written)
        page.locator("#stop").focus()
        page.keyboard.press("Enter")
        assert "Stop young after its current step?" in page.locator("#sure").inner_text()
        page.keyboard.press("Escape")
        assert page.locator("#sure").is_hidden()
        assert not (runs / "young" / STOP).exists()
        page.locator("#stop").click()
        page.get_by_role("button", name="Stop", exact=True).last.press("Enter")
        wait_until((runs / "young" / STOP).exists)
        page.get_by_text("stops after this step").first.wait_for()
        page.locator("#runs button", has_text="tiny").press("Enter")
        wait_until(lambda: page.title() == "tiny: finished")
        assert page.locator("#name").inner_text() == "tiny"
        assert page.locator("#stop").is_hidden()
        slider = page.locator("#moment")
        last = page.locator("#moment-name").inner_text()
        slider.press("Home")
        assert page.locator("#moment-name").inner_text() != last


@pytest.mark.slow
def test_hostile_names_samples_and_settings_stay_text(runs, open_page):
    name = HOSTILE.replace("/", "⁄")  # which no file's name has
    shutil.move(runs / "tiny", runs / name)
    shutil.rmtree(runs / "young")
    section = _as_section(Moment(HOSTILE, 1, [HOSTILE]), {})
    (runs / name / "samples.md").write_text(f"# x\n\n{section}\n", encoding="utf-8")
    data = {"files": [{"name": HOSTILE.replace("/", "⁄")}], "tokens": 5}
    (runs / name / "data.json").write_text(json.dumps(data), encoding="utf-8")
    with Watcher(runs) as server:
        page = open_page(server)
        assert page.locator("#name").text_content() == name
        assert page.locator("#sample").text_content() == HOSTILE
        assert HOSTILE in page.locator("#moment-name").text_content()
        assert page.locator("#headline").text_content()
        assert name in page.locator("#facts").text_content()
        assert page.locator("main img, main script, main a").count() == 0


@pytest.mark.slow
def test_a_hundred_thousand_steps_are_drawn_light_and_dark_and_fit_a_phone(runs, open_page):
    shutil.rmtree(runs / "young")
    waves = random.Random(1)
    rows = [row(n, train_loss=3 + waves.random(), train_lr=1e-3) for n in range(1, 100_001)]
    (runs / "tiny" / "metrics.jsonl").write_bytes(lines_of([row(0, val_loss=4.0), *rows]))
    with Watcher(runs) as server:
        page = open_page(server)
        drawn = page.locator("#loss path.line.train").get_attribute("d")
        assert 400 < drawn.count("L") < 1000
        shown = ["#name", "#about", "#facts dt", "#facts dd", ".chart .readout", "#runs small"]
        shown += ["#go", "#runs strong", "#loss figcaption .train", "#loss figcaption .val"]
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            contrasts = dict(zip(shown, page.evaluate(CONTRAST, shown), strict=True))
            assert {part: c for part, c in contrasts.items() if c < 4.5} == {}
        phone = {"viewport": {"width": 400, "height": 800}, "has_touch": True, "is_mobile": True}
        page = open_page(server, locale="zh-CN", **phone)
        assert page.evaluate("document.documentElement.lang") == "zh-CN"
        assert page.get_by_text("用它写").is_visible()
        assert not page.evaluate(
            "() => document.scrollingElement.scrollWidth > innerWidth || scrollX > 0"
        )
        nameless = page.evaluate(
            """() => [...document.querySelectorAll("button, input, textarea, nav, svg, progress")]
              .filter((e) => !e.ariaLabel && !e.labels?.length && !e.textContent.trim())
              .map((e) => e.outerHTML)"""
        )
        assert nameless == []


@pytest.mark.slow
def test_the_page_asks_for_the_token_and_finds_a_server_again_that_was_away(runs, open_page):
    shutil.rmtree(runs / "young")
    open_page.expected += ["401 (Unauth", "ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE", "ERR_EMPTY"]
    with Watcher(runs) as server:
        page = open_page(server)
        page.evaluate("location.hash = ''")
        page.reload()
        for given, answer in (("wrong", "That is not the token."), (TOKEN, "tiny")):
            page.locator("#token").fill(given)
            page.keyboard.press("Enter")
            page.get_by_text(answer).first.wait_for()
        page.wait_for_selector("#ask", state="hidden")
        page.wait_for_selector("#loss svg path.line")
    page.get_by_text("The server does not answer. Trying again").wait_for()
    with Watcher(runs, f"--port={server.port}"):
        with open(runs / "tiny" / "metrics.jsonl", "ab") as file:
            file.write(lines_of([row(300, train_loss=1.25)]))
        page.get_by_text("step 300 · training 1.25").wait_for()
        assert page.locator("#summary").inner_text() == ""
