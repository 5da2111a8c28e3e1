"""The table of docs/comparing-engines.md: nanovllm over each other engine, of every published study that
compares the two with everything on in both.

Made from the records, as every page of results is: `python -m reports published`. The rest of the page
is written by hand.
"""

from collections.abc import Iterator
from pathlib import Path

from experiments.host.provenance import ROOT
from experiments.records.cell_names import engine as engine_name
from reports import text
from reports.analysis.analyse import ratios
from reports.analysis.compare import against_engines
from reports.analysis.types import Effect
from reports.claims.published_studies import Library, Study
from reports.claims.results_index import REPORT, day
from reports.statistics.metrics import THROUGHPUT

PAGE = ROOT / "docs" / "comparing-engines.md"
BEGIN, END = "<!-- python -m reports published -->", "<!-- end of the comparisons -->"
BEST = "best"
ASKED_LATER = (("h200-x2/scaling", "tp2", "vllm-tp2"),)
"""(study, our cell, theirs) of studies whose plan names no comparison: asked after they ran, so there is no
verdict, as in `python -m reports ratio`.
"""


def table(library: Library) -> str:
    """One row for each study, engine and workload: vLLM before HF, then by machine, the newest first."""
    rows = [
        "| nanovllm over | machine and model | workload | nanovllm, tok/s | ratio (95 % interval) | verdict | blocks | study |",
        "| --- | --- | --- | ---: | ---: | --- | ---: | --- |",
    ]
    found = [row for study in library.studies.values() for row in _rows(study)]
    found.sort(key=lambda row: row[0])
    return "\n".join(rows + [f"| {' | '.join(cells)} |" for _, cells in found])


def _rows(study: Study) -> Iterator[tuple[tuple[bool, str, int, str], list[str]]]:
    """(what to sort by, cells) of a study."""
    date, link = day(study), f"../reports/published/{study.name}/{REPORT}"
    model = study.plan["model"]
    of_rates = {
        (row["cell"], row["workload"]): row["mean"]
        for row in study.analysis["rates"]
        if row["metric"] == THROUGHPUT.key
    }
    for engine, version, effect, verdict, of in _pairs(study):
        named = engine_name(engine, version)
        yield (
            (engine != "vllm", study.hardware, -int(date.replace("-", "")), study.name),
            [
                named,
                f"{study.hardware}, {model['preset']} in {model['dtype']}",
                effect["workload"] + of,
                text.number(of_rates.get((effect["cell"], effect["workload"]))),
                f"{text.ratio(effect['ratio'])} ({text.interval(effect['low'], effect['high'])})",
                verdict,
                str(effect["n"]),
                f"[{study.plan['study']['name']}, {date}]({link})",
            ],
        )


def _pairs(study: Study) -> Iterator[tuple[str, str | None, Effect, str, str]]:
    """(engine, its version, effect, verdict in words, what to add to the workload)"""
    for entry in against_engines(study.analysis):
        if entry["name"] == BEST:
            for effect in entry["effects"].get(THROUGHPUT.key, {}).values():
                if effect["n"]:
                    yield entry["engine"], entry["version"], effect, text.verdict(effect), ""
    for name, ours, theirs in ASKED_LATER:
        if name == study.name:
            engine = study.plan["cells"][theirs]["engine"]
            version = next(
                record["resolved"].get("version")
                for record in study.records
                if record["kind"] == "launch" and record["cell"] == theirs and record["resolved"]
            )
            for effect in ratios(study.records, study.plan, ours, theirs):
                if effect["workload"] in study.plan["workloads"]:
                    yield engine, version, effect, text.ABSENT, f", {ours} over {theirs}"


def write(out: Path, library: Library) -> None:
    """Writes the page with a fresh table below `out`, which stands for the repository's root."""
    path = out / PAGE.relative_to(ROOT)
    path.parent.mkdir(parents=True, exist_ok=True)
    page = text.put_between(PAGE.read_text(encoding="utf-8"), BEGIN, END, table(library))
    path.write_text(page, encoding="utf-8")
