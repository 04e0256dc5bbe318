"""report.html: what a run means, drawn from the files in its folder."""

import math
from pathlib import Path
from typing import Any

from engine.console import say
from engine.errors import ResourceError, first_line
from insight.curves import CurvesFile
from insight.diagnosis import Finding, diagnose
from insight.measuring import measure_in_run
from insight.page import render_page
from insight.run_files import INSIGHT, RunFiles, read_run
from insight.run_text import RunText
from insight.verdict import printed_lines
from storage.files import write_atomically, write_json

REPORT = "report.html"
NO_REPORT = "no report could be drawn"
# of a run's time, that measuring its text may take, and the most: the loop waits for it
MEASURED_SHARE, MOST_MEASURED_S = 0.01, 10.0


class Report:
    """The report of a run, which is drawn again and again while it trains.

    text: the run's, which is measured once there is time for it, at most limit_s.
    """

    def __init__(
        self, folder: Path, text: RunText | None = None, *, limit_s: float = math.inf
    ) -> None:
        self.folder = folder
        self._text = text
        self._limit_s = min(limit_s, MOST_MEASURED_S)
        self._curves = CurvesFile(folder / "metrics.jsonl")
        self._has_failed = False

    def read(self) -> tuple[RunFiles, list[Finding]]:
        """The run's files as they are now, and the diagnosis; CheckpointError as read_run()."""
        run = read_run(self.folder, self._curves)
        return run, diagnose(run.curves, run.facts)

    def draw(self) -> list[str]:
        """Write report.html; returns what a finished run prints of it.

        Raises CheckpointError as read(), and ResourceError if the disk refuses it.
        """
        run, findings = self._draw()
        return printed_lines(run, findings)

    def _draw(self) -> tuple[RunFiles, list[Finding]]:
        run, findings = self.read()
        write_atomically(self.folder / REPORT, render_page(run, findings))
        return run, findings

    def note(self, facts: dict[str, Any]) -> None:
        """Keep what was measured about the run; ResourceError if the disk refuses it."""
        known = read_run(self.folder, self._curves).insight
        baselines = {**(known.get("baselines") or {}), **(facts.get("baselines") or {})}
        write_json(self.folder / INSIGHT, known | facts | {"baselines": baselines})

    def follow(self, elapsed_s: float) -> dict[str, float]:
        """Measure the run's text if there is time for it after elapsed_s of training, and draw
        the report; never fails, but says so once.

        Returns the baselines that are known so far, as losses in nats a token.
        """
        try:
            self._measure(min(MEASURED_SHARE * elapsed_s, self._limit_s))
        except Exception as error:  # whatever it is, it is no reason to end a run
            self._text = None  # it would fail again
            self._say_once(error, "the text could not be measured", " Training goes on")
        try:
            run, _ = self._draw()
        except Exception as error:  # as above
            self._say_once(error, NO_REPORT, " Training goes on")
            return {}
        nats = math.log(2) * run.curves.bytes_a_token
        return {name: bits * nats for name, bits in run.facts.baselines.items()}

    def _measure(self, limit_s: float) -> None:
        """Measure the text if there is time for it; an earlier measurement stays."""
        if self._text is None:
            return
        known = read_run(self.folder, self._curves).insight
        if "repeated" in known:  # by an earlier process, or by scripts.report
            self._text = None
        elif facts := measure_in_run(self._text, limit_s):
            self._text = None
            baselines = facts.get("baselines", {}) | known.get("baselines", {})
            self.note(facts | known | {"baselines": baselines})

    def finish(self) -> list[str]:
        """Draw the report of a run that has ended; never fails, but says so once.

        Returns what a finished run prints, or nothing.
        """
        try:
            return self.draw()
        except Exception as error:
            self._say_once(error, NO_REPORT)
            return []

    def _say_once(self, error: Exception, failure: str, then: str = "") -> None:
        if not self._has_failed:
            self._has_failed = True
            known = isinstance(error, ResourceError)
            reason = first_line(error) if known else f"{failure}: {error!r}."
            say(f"Note: {reason}{then}")
