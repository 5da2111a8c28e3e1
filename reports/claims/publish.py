"""From a finished execution to a folder of reports/published: what is worth keeping, in as few
bytes as it takes.

The plan goes as it is, since its hash is in every record. In the records, paths of this clone are
written relative to it; nothing else is changed. Generated tokens are kept, compressed as they are,
so that anyone can judge them again (`python -m reports audit --judge`); if they take more than a
megabyte, their digests in the records have to do.
"""

import json
import re
import shutil
from pathlib import Path

from experiments.host import provenance
from experiments.records.store import PLAN, RECORDS, TOKENS, RecordError, read_for_report
from reports.analysis.analyse import analyse
from reports.claims.published_studies import PUBLISHED

_README = """# {title}, {when}

{sentence}

    {command}
    python -m reports render {folder}     # the page, from these records

Paths in the records are written relative to the clone; nothing else was changed. {tokens}
"""
_KEPT = """`tokens.jsonl` holds the
generated tokens: `python -m reports audit --judge {folder}` judges them again."""
_JUDGED = """`tokens.jsonl`, which the gate judged, is too
large to be kept here; `records.jsonl` holds its digests."""
_UNJUDGED = """No gate judged the outputs: the
generated tokens are not kept here, `records.jsonl` holds their digests."""
MOST_TOKEN_BYTES = 1_000_000
"""The repository takes no larger file of generated tokens."""


def publish(folder: Path, name: str, command: str, root: Path = PUBLISHED) -> Path:
    """Copies an execution to reports/published/`name`, with a README that says what it is and
    `command`, which made it.

    Raises RecordError where nothing counts, where other records are published under that name, and
    for a name that is none.
    """
    if not re.fullmatch(r"[a-z0-9][\w.+-]*(/[a-z0-9][\w.+-]*)*", name):
        raise RecordError(
            f"{name!r}: give a place under {root.name}/ in small letters and slashes, e.g. cpu-two-cores/embedded"
        )
    plan, file = read_for_report(folder)
    analysis = analyse(file.records, plan, file.notes)
    if not analysis["counts"]["counted_launches"] and not analysis["unjudged"]:
        raise RecordError(
            f"{folder}: {analysis['answer']['sentence']} Such records are not published; see its report for why"
        )
    text = (
        (folder / RECORDS)
        .read_text(encoding="utf-8")
        .replace(json.dumps(str(provenance.ROOT))[1:-1], ".")
    )
    target = root / name
    if (target / RECORDS).is_file() and not text.startswith(
        (target / RECORDS).read_text(encoding="utf-8")
    ):
        raise RecordError(
            f"{target} holds other records; give another name, or remove that folder first"
        )
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / PLAN, target / PLAN)
    (target / RECORDS).write_text(text, encoding="utf-8")
    judged, tokens = bool(analysis["gate"]["rows"]), folder / TOKENS
    keep = judged and tokens.is_file() and tokens.stat().st_size <= MOST_TOKEN_BYTES
    if keep:
        shutil.copyfile(tokens, target / TOKENS)
    if not (target / "README.md").exists():
        when = min(record["started_at"] for record in file.records if record["kind"] == "launch")[
            :10
        ]
        title, sentence = plan["study"]["title"], analysis["answer"]["sentence"]
        shown = (
            target.relative_to(provenance.ROOT)
            if target.is_relative_to(provenance.ROOT)
            else target
        )
        of_tokens = (_KEPT.format(folder=shown) if keep else _JUDGED) if judged else _UNJUDGED
        readme = _README.format(
            title=title,
            when=when,
            sentence=sentence,
            command=command,
            folder=shown,
            tokens=of_tokens,
        )
        (target / "README.md").write_text(readme, encoding="utf-8")
    return target
