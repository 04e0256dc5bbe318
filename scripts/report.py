"""Draw the report of a run anew, with all that can be measured:  python -m scripts.report RUN

A run draws report.html itself, with what there is time for. This adds what takes longer: what
simple models and compressors make of the validation text, copies between the texts, and how much
of its training text the model has by heart. Then it prints the diagnosis.
"""

import argparse

from engine.starting import end_at_ctrl_c

if __name__ == "__main__":
    end_at_ctrl_c()

from engine.console import tell
from engine.errors import CheckpointError, DataError, SettingsError, first_line
from exchange.saved_run import find_run
from insight.diagnosis import Finding
from insight.measuring import measure_model, measure_text
from insight.report import REPORT, Report
from insight.run_files import RunFiles
from insight.run_text import open_run_text
from insight.verdict import change_lines, headline
from scripts.options import add_runs_argument, new_parser, run_program, write

LONGEST_S = 3600.0  # that --seconds may be


def main() -> int:
    """Read the options, measure, and draw and print the report of each run; returns 0."""
    arguments = _parser().parse_args()
    if not 1 <= arguments.seconds <= LONGEST_S:
        raise SettingsError(
            f"--seconds is {arguments.seconds:g}; it must be between 1 and {LONGEST_S:g}"
        )
    for path in [find_run(name) for name in arguments.runs] or [find_run(None)]:
        report = Report(path)
        if not arguments.as_is:
            _measure(report, arguments.seconds)
        report.draw()
        run, findings = report.read()
        for line in lines_of(run, findings):
            write(f"{line}\n")
        write(f"Report: {path / REPORT}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add_runs_argument(parser, "newest finished")
    parser.add_argument(
        "--as-is", action="store_true", help="measure nothing: draw what the folder has"
    )
    parser.add_argument(
        "--seconds",
        metavar="X",
        type=float,
        default=30.0,
        help="that baselines may take; of a large text they then see a sample (30)",
    )
    return parser


def _measure(report: Report, limit_s: float) -> None:
    """Measure the text and then the model of a run; say so if text or weights are gone."""
    path = report.folder
    try:
        text = open_run_text(path)
    except DataError as error:
        tell(f"Note: {first_line(error)} The report has what was measured before")
        return
    run, _ = report.read()
    if run.record.chat is None:  # else only answers are scored, and nothing else compares
        tell(f"Measuring the text of {path.name} ...")
        report.note(measure_text(text, limit_s))
    tell("Measuring what the model has by heart ...")
    try:
        report.note(measure_model(run, text))
    except CheckpointError as error:
        tell(f"Note: {first_line(error)} The report lacks what the model has by heart")


def lines_of(run: RunFiles, findings: list[Finding]) -> list[str]:
    """A diagnosis as text: the sentence that matters first, then every finding."""
    lines = [f"{run.path.name}: {headline(run, findings).en}"]
    for finding in findings:
        lines += [
            f"- {finding.severity}: {finding.title.en} ({finding.confidence:.0%} sure)",
            f"  {finding.evidence.en}",
            f"  {finding.advice.en}",
            *(f"      {line.en}" for line in change_lines(finding.changes, run.facts)),
        ]
    return lines


if __name__ == "__main__":
    run_program(main)
