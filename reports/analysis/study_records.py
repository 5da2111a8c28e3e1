"""The plan and the records of a finished, killed or copied execution, for its report.

The reader is experiments/records/reading.py. It takes what can be trusted and names everything else in
`RecordFile.notes`, which the report prints.
"""

from pathlib import Path

from experiments.records.reading import RecordError, RecordFile, read_records
from experiments.records.store import PLAN, RECORDS, read_plan
from experiments.records.types import Plan

__all__ = ["RecordError", "RecordFile", "read_folder", "read_plan", "read_records"]


def read_folder(folder: Path) -> tuple[Plan, RecordFile]:
    """The plan and the records of one execution. Raises RecordError if either cannot be used."""
    return read_plan(folder / PLAN), read_records(folder / RECORDS)
