"""Diagnoses exploding gradients: where in the program, why, and what to do."""

from optclip.diagnosis._diagnose import diagnose
from optclip.diagnosis.facts import HistoryFact
from optclip.diagnosis.findings import Diagnosis, Finding, Remedy
from optclip.diagnosis.page import write_report
from optclip.diagnosis.taps import Site, Taps, tap
from optclip.diagnosis.thresholds import Suggestion, suggest_threshold

__all__ = [
    "Diagnosis",
    "Finding",
    "HistoryFact",
    "Remedy",
    "Site",
    "Suggestion",
    "Taps",
    "diagnose",
    "suggest_threshold",
    "tap",
    "write_report",
]


def __dir__() -> list[str]:
    return list(__all__)
