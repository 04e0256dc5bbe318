"""report.html: what a run means, drawn from the files in its folder."""

from pathlib import Path
from typing import Any

from insight.curves import CurvesFile
from insight.diagnosis import Finding, diagnose
from insight.page import render_page
from insight.run_files import INSIGHT, RunFiles, read_run
from insight.verdict import printed_lines
from storage.files import write_atomically, write_json

REPORT = "report.html"


class Report:
    """The report of a run, which is drawn again and again while it trains."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._curves = CurvesFile(folder / "metrics.jsonl")

    def read(self) -> tuple[RunFiles, list[Finding]]:
        """The run's files as they are now, and the diagnosis; CheckpointError as read_run()."""
        run = read_run(self.folder, self._curves)
        return run, diagnose(run.curves, run.facts)

    def draw(self) -> list[str]:
        """Write report.html; returns what a finished run prints of it.

        Raises CheckpointError as read(), and ResourceError if the disk refuses it.
        """
        run, findings = self.read()
        path = self.folder / REPORT
        write_atomically(path, render_page(run, findings))
        return printed_lines(run, findings, str(path))

    def note(self, facts: dict[str, Any]) -> None:
        """Keep something that was measured about the run; ResourceError if the disk refuses it."""
        run = read_run(self.folder, self._curves)
        write_json(self.folder / INSIGHT, run.insight | facts)
