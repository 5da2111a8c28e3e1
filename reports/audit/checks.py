"""What `python -m reports audit` checks of a folder of published records.

Rendering a report already refuses what contradicts itself. An audit asks more of records that
somebody publishes: nothing may have been refused for a contradiction, what they refer to must exist
(the workloads, the code, the tokens), and the committed page must be the one that the records give.
"""

import enum
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import workloads
from experiments.gate.verdicts import GateError, read_tokens
from experiments.host.environment import for_subprocess
from experiments.host.provenance import ROOT
from experiments.records import store
from experiments.records.types import Plan, Record
from experiments.study.yaml_files import SpecError
from reports.analysis.analyse import analyse
from reports.analysis.counting import WITHOUT_PRICE
from reports.analysis.types import Analysis
from reports.audit.git_files import NotInGitError, code_digest_of
from reports.page.render import render


class Outcome(enum.StrEnum):
    """What came of a check. UNKNOWN: the folder does not hold, or this clone lacks, what it needs."""

    HOLDS = "holds"
    BROKEN = "BROKEN"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Finding:
    """One check of one folder, with its outcome and what was seen."""

    check: str
    outcome: Outcome
    detail: str


@dataclass(frozen=True)
class Published:
    """What a folder holds, read once for all checks."""

    folder: Path
    plan: Plan
    records: list[Record]
    notes: list[str]
    analysis: Analysis

    @property
    def launches(self) -> list[Mapping[str, Any]]:
        return [record for record in self.records if record["kind"] == "launch"]

    @property
    def verdicts(self) -> list[Mapping[str, Any]]:
        """The gate's lines, without those of its negative controls."""
        lines = [record for record in self.records if record["kind"] == "gate"]
        return [line for line in lines if not line["is_negative_control"]]


Check = Callable[[Published], tuple[Outcome, str]]


def audit(folder: Path, *, judge: bool = False) -> Iterator[Finding]:
    """Every check of one folder of records. judge: also rescore the tokens that were kept with HF
    transformers, which takes as long as the gate took.
    """
    try:
        plan, file = store.read_for_report(folder)
    except store.RecordError as error:
        yield Finding("readable", Outcome.BROKEN, str(error))
        return
    work = Finding("workloads", *_workloads(plan))
    yield work
    if work.outcome is Outcome.BROKEN:
        return  # an analysis rests on them
    analysis = analyse(file.records, plan, file.notes)
    published = Published(folder, plan, file.records, file.notes, analysis)
    for name, check in CHECKS.items():
        yield Finding(name, *check(published))
    if judge:
        yield Finding("verdicts again", *_judged_again(published))


def _complete(published: Published) -> tuple[Outcome, str]:
    """The files are undamaged, and every launch of the plan has a record."""
    if published.notes:
        return Outcome.BROKEN, "; ".join(published.notes)
    ran = {record["launch"] for record in published.launches}
    planned = [entry["launch"] for entry in published.plan["launches"]]
    missing = [name for name in planned if name not in ran]
    if missing:
        return (
            Outcome.UNKNOWN,
            f"{len(missing)} of {len(planned)} planned launches have no record: the study was cut short",
        )
    return Outcome.HOLDS, f"{len(planned)} planned launches, each with a record"


def _workloads(plan: Plan) -> tuple[Outcome, str]:
    """The plan's workloads, built again from their parameters, are the ones that were served."""
    planned_work = dict(plan["workloads"])
    if "price" in plan:
        planned_work["price.prompts"] = plan["price"]["prompts"]
    for name, planned in planned_work.items():
        try:
            built = workloads.build(name, planned["kind"], planned["params"])
        except (ValueError, KeyError, TypeError, SpecError) as error:
            return Outcome.BROKEN, f"{name} cannot be built from its parameters: {error}"
        again = workloads.summarize(built)
        for key, value in planned.items():
            if key in again and again[key] != value:  # type: ignore[literal-required]
                return (
                    Outcome.BROKEN,
                    f"{name}: {key} is {value} in the plan and {again[key]} from its parameters",  # type: ignore[literal-required]
                )
    count = len(plan["workloads"])
    return Outcome.HOLDS, f"{count} built again from the plan, with the same digests"


_ALLOWED = (
    "disturbed:",
    "the gate did not check",
    "gate: fail",
    "superseded",
    "an earlier attempt",
    "failed:",
    "invalid:",
    f"{WITHOUT_PRICE}: it was not measured",
    f"{WITHOUT_PRICE}: it could not be measured",
)
"""How the reasons begin for which an honest launch may be left out."""


def _launches(published: Published) -> tuple[Outcome, str]:
    """No launch was left out because it contradicts the plan, itself, or the methodology."""
    excluded = published.analysis["excluded"]
    for row in excluded:
        contradicted = "contradict" in row["reason"]
        if contradicted or not row["reason"].startswith(_ALLOWED):
            return Outcome.BROKEN, f"{row['launch']}: {row['reason']}"
    counted = published.analysis["counts"]["counted_launches"]
    left_out = f"; {len(excluded)} left out, each with its reason" if excluded else ""
    return Outcome.HOLDS, f"{counted} launches count{left_out}"


def _verdicts(published: Published) -> tuple[Outcome, str]:
    """Each pass of the gate follows from the figures beside it, for as many tokens as were made."""
    lines = published.verdicts
    if not lines:
        return Outcome.UNKNOWN, "no gate judged the outputs; nothing is concluded from them"
    for row in published.analysis["gate"]["rows"]:
        recorded = {
            line["status"]
            for line in lines
            if (line["workload"], line["tokens_digest"][:12])
            == (row["workload"], row["tokens_digest"][:12])
        }
        if row["status"] == "fail" and "pass" in recorded:
            return Outcome.BROKEN, f"{row['workload']}: {row['reason']}"
    return Outcome.HOLDS, f"{len(lines)} verdicts follow from their figures"


def _tokens(published: Published) -> tuple[Outcome, str]:
    """The tokens that were kept are those that the records name."""
    if not (published.folder / store.TOKENS).exists():
        return (
            Outcome.UNKNOWN,
            "no tokens were kept; the study, run again, gives their digests where its arithmetic is the same",
        )
    wanted = {
        (work["tokens_digest"], name): work["output_tokens"]
        for record in published.launches
        if record["status"] == "ok"
        for name, work in record["workloads"].items()
    }
    for (digest, name), count in wanted.items():
        try:
            outputs = read_tokens(published.folder, digest)
        except GateError as error:
            return Outcome.BROKEN, f"{name}: {error}"
        if sum(map(len, outputs)) != count:
            return Outcome.BROKEN, f"{name}: {sum(map(len, outputs))} tokens, {count} recorded"
    return Outcome.HOLDS, f"{len({digest for digest, _ in wanted})} distinct outputs, as recorded"


def _page(published: Published) -> tuple[Outcome, str]:
    """The committed page is the one that the records give."""
    committed = published.folder / "report" / "report.md"
    if not committed.is_file():
        return Outcome.UNKNOWN, "no page is committed; `python -m reports render` writes one"
    with tempfile.TemporaryDirectory() as aside:
        # a page refers to other files relative to its own place
        markdown, _ = render(
            published.plan, published.records, published.analysis, Path(aside) / "report"
        )
        same = markdown.read_text(encoding="utf-8") == committed.read_text(encoding="utf-8")
    if not same:
        return Outcome.BROKEN, f"{committed} is not what the records give; render it again"
    return Outcome.HOLDS, "the committed page is what the records give"


def _code(published: Published) -> tuple[Outcome, str]:
    """The measured code is that of the commit which the records name."""
    seen = {
        (record["provenance"]["git"]["commit"], record["provenance"].get("code_digest"))
        for record in published.launches
        if record["status"] == "ok" and record["provenance"].get("git")
    }
    dirty = any(
        record["provenance"]["git"]["dirty"]
        for record in published.launches
        if record["provenance"].get("git")
    )
    if not seen or any(commit is None for commit, _ in seen):
        return Outcome.UNKNOWN, "the records name no commit"
    if dirty:
        commits = ", ".join(sorted(str(commit)[:12] for commit, _ in seen))
        return Outcome.UNKNOWN, f"the tree had changes on top of commit {commits}"
    for commit, digest in sorted(seen):
        try:
            found = code_digest_of(str(commit))
        except NotInGitError as reason:
            return Outcome.UNKNOWN, str(reason)
        if found != digest:
            return (
                Outcome.BROKEN,
                f"commit {str(commit)[:12]} has measured code {found[:12]}, recorded {str(digest)[:12]}",
            )
    return Outcome.HOLDS, f"that of commit {', '.join(sorted(str(c)[:12] for c, _ in seen))}"


def _judged_again(published: Published) -> tuple[Outcome, str]:
    """HF transformers, asked again, accepts the tokens that were kept."""
    if not (published.folder / store.TOKENS).exists():
        return Outcome.UNKNOWN, "no tokens were kept"
    before = {(line["workload"], line["tokens_digest"]): line for line in published.verdicts}
    with tempfile.TemporaryDirectory() as aside:
        folder = Path(aside)
        for name in (store.PLAN, store.TOKENS):
            (folder / name).write_bytes((published.folder / name).read_bytes())
        kept = [record for record in published.records if record["kind"] != "gate"]
        (folder / store.RECORDS).write_text(
            "".join(json.dumps(record, separators=(",", ":")) + "\n" for record in kept),
            encoding="utf-8",
        )
        done = subprocess.run(
            [
                *(sys.executable, "-m", "experiments.gate"),
                *("--plan", str(folder / store.PLAN), "--out", str(folder)),
            ],
            cwd=ROOT,
            env=for_subprocess(),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode not in (0, 1):
            return Outcome.UNKNOWN, f"the gate could not run: {done.stderr.strip()[-300:]}"
        again = {
            (line["workload"], line["tokens_digest"]): line
            for line in store.read(folder)
            if line["kind"] == "gate"
        }
    for key, line in before.items():
        now = again.get(key)
        if now is None or (now["status"], now["tokens_checked"]) != (
            line["status"],
            line["tokens_checked"],
        ):
            said = f"{now['status']}: {now.get('reason')}" if now else "nothing"
            return Outcome.BROKEN, f"{key[0]}: recorded {line['status']}, judged again {said}"
    return Outcome.HOLDS, f"{len(before)} verdicts, the same when judged again"


CHECKS: dict[str, Check] = {
    "complete": _complete,
    "launches": _launches,
    "verdicts": _verdicts,
    "tokens": _tokens,
    "page": _page,
    "code": _code,
}
"""By name, in the order in which they are shown, after `workloads`; each docstring says what holds."""
