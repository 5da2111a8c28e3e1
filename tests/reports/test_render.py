"""The rendered report: complete, self-contained, escaped, and the same bytes for the same records."""

import copy
import io
import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console
from typer.testing import CliRunner

from experiments.look import escape_markdown
from experiments.records.store import plan_hash, read_for_report
from nanovllm.models.checkpoint import DIGESTS
from reports.__main__ import app
from reports.analysis.analyse import analyse
from reports.claims.published_studies import PUBLISHED
from reports.figures.layout import NARROW, WIDE, canvas, lines
from reports.figures.ratio_plots import forest
from reports.figures.svg import FONT, LIGHT, inline, standalone, style, to_svg
from reports.page.evidence import reproduce_command
from reports.page.overview import overview
from reports.page.render import print_table, render
from reports.page.table import MOST_ROWS, _fitting, _rows, answer_lines
from tests.support.synthetic import cell_of, factorial, make_plan, make_records, one_at_a_time

SPEEDUPS = {"prefix_cache": 1.0, "batching": 2.5, "tensor_parallel_size": 0.7, "hf": 0.8}
ROW = r" \S.* ×\d.*(faster|slower|equivalent|inconclusive)"
HOSTILE = "<script>alert('x')</script> | `code` [link](http://example.com) *bold*"
Study = tuple[dict[str, Any], list[dict[str, Any]]]


def rendered(plan: dict[str, Any], records: list[dict[str, Any]], out: Path) -> tuple[str, str]:
    """(Markdown, HTML) of a study."""
    markdown, html = render(plan, records, analyse(records, plan), out)
    return markdown.read_text(), html.read_text()


def parse(html: str) -> ElementTree.Element:
    """The page is written as XML, so that "well-formed" can be checked by a parser that forgives
    nothing.
    """
    return ElementTree.fromstring(html.removeprefix("<!DOCTYPE html>"))


def ragged_tables(markdown: str) -> list[str]:
    """Rows of Markdown tables that have another number of cells than the row above."""
    lines = markdown.split("\n")
    cells = [line.replace("\\|", "").count("|") if line.startswith("|") else 0 for line in lines]
    return [
        lines[i]
        for i in range(1, len(lines))
        if cells[i] and cells[i - 1] and cells[i] != cells[i - 1]
    ]


@pytest.fixture(scope="module")
def study() -> Study:
    plan = make_plan(one_at_a_time(), 6, ("scaled", "shared"))
    records = make_records(plan, SPEEDUPS)
    records[3] |= {"status": "failed", "reason": "exit code 137"}
    return plan, records


@pytest.fixture(scope="module")
def pages(study: Study, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, Path]:
    out = tmp_path_factory.mktemp("report")
    return *rendered(*study, out), out


def test_the_page_is_well_formed_with_unique_ids_and_live_anchors(
    pages: tuple[str, str, Path],
) -> None:
    page = parse(pages[1])
    ids = [element.get("id") for element in page.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    targets = re.findall(r'(?:href="|url\()#([^")]+)', pages[1])
    assert targets
    assert set(targets) <= set(ids)


def test_the_page_needs_nothing_but_itself(pages: tuple[str, str, Path]) -> None:
    _, html, _ = pages
    assert "http:" not in html
    assert "https:" not in html
    assert not re.search(r"<(script|img|iframe|object|embed|base|form)\b|@import|@font-face", html)
    links = [
        value
        for element in parse(html).iter()
        for name, value in element.attrib.items()
        if name in ("href", "src")
    ]
    assert all(link.startswith("#") or link == "data:," for link in links)


def test_figures_follow_the_theme_and_have_words(pages: tuple[str, str, Path]) -> None:
    _, html, out = pages
    page = parse(html)
    figures = list(page.iter("svg"))
    names = {"forest", "aa", "ceiling", "order"}
    assert len(figures) == 2 * len(names)  # for a desk and for a phone
    for figure in figures:
        texts = [figure.findtext("title"), figure.findtext("desc")]
        assert all(texts), figure.attrib
        labels = str(figure.get("aria-labelledby")).split()
        assert [figure.find("title").get("id"), figure.find("desc").get("id")] == labels  # type: ignore[union-attr]
        styles = " ".join(element.get("style", "") for element in figure.iter())
        assert "var(--ink)" in styles
        assert not re.findall(r"#[0-9a-f]{6}", styles)
    assert "prefers-color-scheme: dark" in html
    assert {path.stem for path in (out / "figures").iterdir()} == names
    for path in (out / "figures").iterdir():
        ElementTree.parse(path)


def test_the_answer_comes_first_and_the_evidence_follows(pages: tuple[str, str, Path]) -> None:
    for text in pages[:2]:
        order = [
            "A synthetic study",
            "Are planted effects found?",
            "Synthetic 2-core, 2 cores, tiny in float32, 20",
            "scaled: 8 requests, prompt 12 to 32, output 12 to 32 tokens",
            "On scaled, everything on (",
            "On shared, everything on gives",
            "Output: equivalent. Every judged token passed the gate (",
            "Throughput and speedup",
            "Workloads",
            "Machine and date",
            "Evidence",
            "Effects and tests",
            "Against other engines",
            "Throughput against the roofline bound",
            "Latency: time to first token (TTFT) and per output token (TPOT)",
            "A/A twin: the noise of this machine",
            "Order of the launches",
            "Gate: is the output still right?",
            "Did each optimization run?",
            "What could not run here",
            "Excluded launches",
            "Reproduce",
        ]
        places = [text.index(title) for title in order]
        assert places == sorted(places)
        command = "make ablate STUDY=synthetic PROFILE=cpu MODEL=tiny"
        for fact in (
            "exit code 137",
            "needs a CUDA GPU",
            command,
            "nothing to gain in this workload",
        ):
            assert fact in text
    assert "per output token (TPOT)</b>: TPOT p50, all off → all on: scaled" in pages[0]
    assert "Against other engines</b>: all on ×" in pages[0]
    assert not ragged_tables(pages[0])


def test_what_is_not_folded_can_be_read_in_a_minute(pages: tuple[str, str, Path]) -> None:
    """Question, answers, one chart, one table, the workloads, the machine; everything else is behind a
    title that says what it holds.
    """
    page = parse(pages[1])
    main = page.find("body/main")
    assert main is not None
    open_sections = [section for section in main if section.get("id") != "evidence"]
    assert [section.get("id") for section in open_sections] == ["results", "workloads", "machine"]
    assert sum(len(list(section.iter("figure"))) for section in open_sections) == 1
    assert sum(len(list(section.iter("table"))) for section in open_sections) == 2
    (evidence,) = [section for section in main if section.get("id") == "evidence"]
    assert {child.tag for child in evidence} == {"h2", "p", "details"}
    assert not any("open" in fold.attrib for fold in evidence.iter("details"))
    head = pages[0].split("## Evidence")[0]
    assert len(head.replace("](figures/forest.svg)", "").split()) < 1200
    for row in (
        r"\| `scaled` \| `all off` \| [\d,.]+ \| ×1 \|  \|  \| pass \|",
        r"\| `scaled` \| `A/A twin` \| [\d,.]+ \| ×[\d.]+ \| [\d.]+ to [\d.]+ \| equivalent \| pass \|",
        r"\| `scaled` \| `batching=continuous` \| [\d,.]+ \| ×2.\d+ \| 2.\d+ to 2.\d+ \| faster \| pass \|",
        r"\| `scaled` \| `reference: HF` \| [\d,.]+ \| – \| – \|  \| pass \|",
        r"\| `scaled` \| 8 \| 12 to 32 \| 12 to 32 \| all at once \| 0.6 \|",
        r"\| `shared` \| 8 \| 64 of 2 shared prefixes, then 16 to 32 of its own \| 4 to 16 \|",
        r"- machine: Synthetic 2-core, 2 cores",
        r"- date: 20\d\d-\d\d-\d\d",
        r"- gate: \d+ distinct outputs, all passed\. scaled: 24 of 41 launches gave the tokens of all off, 558 judged",
    ):
        assert re.search(row, head), row
    assert "`baseline" not in head, "it would mean another thing in every study"


def test_a_kind_with_parameters_of_its_own_is_listed(study: Study) -> None:
    """A new kind needs no change of the page, whatever its parameters are called."""
    plan = copy.deepcopy(study[0])
    entry = plan["workloads"]["scaled"]
    for key in ("prompt_tokens", "output_tokens"):
        del entry["params"][key]
    entry |= {"kind": "bursts", "prompt_tokens": 96, "output_tokens": 40}
    plan["sized"] = {"share_of_answers": 0.35}
    analysis = analyse(study[1], study[0])
    analysis["waves"]["scaled"] = [2, 2, 4]
    *_, section = overview(plan, analysis)
    row = section.tables[0].rows[0]
    assert list(row[:5]) == [
        "scaled",
        "8",
        "12.00 on average",
        "5.000 on average",
        "3 waves of 2 to 4",
    ]
    assert section.notes[0].startswith("Answers were cut to 35 % of the length")


def test_terms_are_explained_where_they_first_stand(pages: tuple[str, str, Path]) -> None:
    markdown = pages[0]
    for first, explanation in (
        ("tok/s", "tok/s: output tokens per second"),
        ("A/A twin", "The A/A twin is all off run a second time"),
        ("gate", "gate: pass means that HF transformers"),
        ("TTFT p50", "TTFT, time to first token: from the arrival"),
        ("TPOT p50", "TPOT, time per output token: "),
    ):
        assert first in markdown
        assert explanation in markdown
    assert "all off | `baseline`" in markdown.replace("`all off`", "all off"), "how records call it"


def test_ticks_are_those_of_the_data(pages: tuple[str, str, Path], tmp_path: Path) -> None:
    """1, 2 and 5 of each power of ten, from end to end of what is drawn."""
    plan = make_plan(one_at_a_time(), 3)
    records = make_records(plan, {"batching": 30.0, "tensor_parallel_size": 0.02})
    rendered(plan, records, tmp_path)
    labels = re.findall(r">×([\d.]+)</text>", (tmp_path / "figures" / "forest.svg").read_text())
    ticks = [
        float(label)
        for label in labels
        if label in ("0.05", "0.1", "0.2", "0.5", "1", "2", "5", "10", "20")
    ]
    assert {0.05, 1, 20} <= set(ticks)


@pytest.mark.parametrize("spread", [(30.0, 0.02), (3.0, 0.5), (1.04, 0.97), (1.002, 0.999)])
def test_every_ratio_axis_has_ticks_to_its_ends(spread: tuple[float, float]) -> None:
    plan = make_plan(one_at_a_time(), 3)
    speedups = dict(zip(("batching", "tensor_parallel_size"), spread, strict=True))
    analysis = analyse(make_records(plan, speedups, sd=0.001), plan)
    for width in (WIDE, NARROW):
        figure = forest(analysis, width)
        assert figure is not None
        axes = figure.axes[0]
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        labels = [axes.xaxis.get_major_formatter()(tick) for tick in ticks]
        assert len(set(labels)) == len(labels) >= 2
        if high / low > 5:
            assert ticks[0] < 2.6 * low
            assert ticks[-1] > high / 2.6


def test_every_verdict_has_an_interval(study: Study) -> None:
    plan, records = study
    for effect in analyse(records, plan)["effects"]:
        if effect["verdict"] != "inconclusive":
            assert effect["low"] <= effect["ratio"] <= effect["high"]


OTHER_MACHINES = {
    "locale without UTF-8, another time zone, a hash seed": {
        "PYTHONHASHSEED": "7",
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "TZ": "Pacific/Auckland",
    },
    "processor without vector units, another hash seed": {
        "PYTHONHASHSEED": "8",
        "NPY_DISABLE_CPU_FEATURES": "AVX512F AVX512CD AVX512_SKX AVX2 FMA3",
        "OPENBLAS_CORETYPE": "Nehalem",
    },
}


@pytest.mark.parametrize("machine", OTHER_MACHINES)
def test_same_records_same_bytes(
    machine: str, study: Study, pages: tuple[str, str, Path], tmp_path: Path
) -> None:
    """In another process on what looks like another machine, through the command, from files,
    wherever it is typed; even where a matplotlibrc lies about.
    """
    plan, records = study
    (tmp_path / "matplotlibrc").write_text(
        "lines.linewidth: 9\nfont.size: 30\naxes.facecolor: red\nfont.family: serif\n"
    )
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    (tmp_path / "records.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in records)
    )
    root = Path(__file__).resolve().parents[2]
    known = available_cpu_features()
    wanted = OTHER_MACHINES[machine].get("NPY_DISABLE_CPU_FEATURES", "").split()
    environment = {**os.environ, **OTHER_MACHINES[machine], "PYTHONPATH": f"{root / 'src'}:{root}"}
    environment["NPY_DISABLE_CPU_FEATURES"] = " ".join(
        feature for feature in wanted if feature in known
    )
    subprocess.run(
        [sys.executable, "-m", "reports", "render", str(tmp_path)],
        check=True,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
    )
    first = {
        path.relative_to(pages[2]): path.read_bytes()
        for path in pages[2].rglob("*")
        if path.is_file()
    }
    second = {path: (tmp_path / "report" / path).read_bytes() for path in first}
    assert first == second
    assert len(first) == 6


def test_tokens_of_another_generator_are_judged_by_z_and_have_no_margin(tmp_path: Path) -> None:
    """Greedy tokens of another engine have one."""
    plan = make_plan(one_at_a_time(), 2)
    records = make_records(plan, SPEEDUPS)
    gated = [
        record
        for record in records
        if record["kind"] == "gate" and not record["is_negative_control"]
    ]
    tokens = gated[0]["tokens_checked"]
    part = {
        "first": 0,
        "last": 15,
        "tokens": tokens,
        "mismatches": 0,
        "hf_mismatches": 0,
        "margin": {"q999": 0.0, "max": 0.0},
        "hf_error": {"q999": 1e-6, "max": 6.1e-6},
    }
    for record in gated:
        record["calibration"] |= {"alpha": 1e-6, "distribution": None, "by_position": [part]}
    assert "limit of z" not in rendered(plan, records, tmp_path)[0]
    gated[0]["calibration"]["distribution"] = {
        "z": -1.234,
        "z_limit": 4.891,
        "tokens": tokens,
        "largest_log_evidence": 2.0,
        "log_evidence_limit": 20.0,
    }
    markdown, _ = rendered(plan, records, tmp_path)
    table = markdown.split("The gate, in logits:")[1].split("The gate by output position")
    (sampled,) = [line for line in table[0].split("\n") if "-1.23" in line]
    assert f"| {tokens} | – | – | – | – | -1.23 | 4.89 | 6.1e-06 | 4e-06 |" in sampled
    assert f"| {tokens} | 0 | 0 | 0 | 1.42e-05 | – | – | 6.1e-06 | 4e-06 |" in table[0]
    assert table[1].count(f"| 0 to 15 | {tokens} | – | – | – | – | 1e-06 | 6.1e-06 |") == 1
    assert "a two-sided test at level 1e-06" in markdown


def available_cpu_features() -> set[str]:
    """What numpy dispatches to here: it refuses to switch off what it does not have."""
    import numpy as np

    return set(np.show_config(mode="dicts")["SIMD Extensions"].get("found", []))


def test_text_from_outside_stays_text(tmp_path: Path) -> None:
    cells = (
        cell_of("baseline", "baseline")
        | cell_of("aa", "aa")
        | cell_of(HOSTILE, "all", ["batching"])
    )
    plan = make_plan(cells, 2, title=HOSTILE, question=HOSTILE)
    plan["not_applicable"] = [{"factor": HOSTILE, "level": "on", "reason": HOSTILE}]
    plan["profile"]["title"] = HOSTILE
    plan["plan_hash"] = plan_hash(plan)
    records = make_records(plan, SPEEDUPS)
    records[0] |= {"status": "failed", "reason": HOSTILE}
    records[1]["provenance"]["cpu"]["model"] = HOSTILE
    markdown, html = rendered(plan, records, tmp_path)
    page = parse(html)
    assert not list(page.iter("script"))
    assert page.findtext("head/title") == HOSTILE
    assert HOSTILE in ["".join(cell.itertext()) for cell in page.iter("td")]
    outside_code = re.sub(r"(`+).+?\1", "", markdown)
    assert "<script>" not in outside_code
    assert "[link](" not in outside_code
    assert not ragged_tables(markdown)


SIGNS = "\x1b[31mred\x07 \x00nul \u202edesrever\u202c 漢字 🙂 ]]> </svg> {{ 7*7 }} %s"


def test_signs_that_would_be_obeyed_are_shown(tmp_path: Path) -> None:
    """Control characters move a terminal's cursor and make an SVG unreadable; overrides turn a name
    around.
    """
    cells = (
        cell_of("baseline", "baseline") | cell_of("aa", "aa") | cell_of(SIGNS, "all", ["batching"])
    )
    plan = make_plan(cells, 2, title=SIGNS, question=SIGNS)
    records = make_records(plan, SPEEDUPS)
    records[0] |= {"status": "failed", "reason": SIGNS}
    console = Console(file=io.StringIO(), width=200, force_terminal=False)
    with warnings.catch_warnings():
        # matplotlib has no glyph to measure for some of them
        warnings.simplefilter("ignore", UserWarning)
        markdown, html = rendered(plan, records, tmp_path)
    print_table(analyse(records, plan), console)
    parse(html)
    for path in (tmp_path / "figures").iterdir():
        ElementTree.parse(path)
    for page in (markdown, html, console.file.getvalue()):  # type: ignore[attr-defined]
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", page)
        assert "49" not in page.split("{{ 7")[-1][:8]
    assert "漢字" in html


def test_markdown_is_escaped_without_spoiling_names() -> None:
    assert (
        str(escape_markdown("prefix_cache=on _x_ *a* a|b <b>\nnew"))
        == r"prefix_cache=on \_x\_ \*a\* a\|b &lt;b&gt; new"
    )


def test_a_cpu_is_named_by_its_launches(
    study: Study, pages: tuple[str, str, Path], tmp_path: Path
) -> None:
    assert "- machine: Synthetic 2-core, 2 cores\n" in pages[0]
    plan = study[0] | {"profile": study[0]["profile"] | {"title": "CPU of this machine"}}
    assert "- machine: CPU of this machine\n" in rendered(plan, [], tmp_path)[0], "nothing ran"


def test_a_preset_that_gives_other_weights_today_is_said(
    study: Study, pages: tuple[str, str, Path], tmp_path: Path
) -> None:
    assert (
        f"made for a checkpoint of digest {'d' * 16}. The preset tiny has changed since" in pages[0]
    )
    plan, records = study
    for change in (
        {"digest": DIGESTS["tiny"]},
        {"digest": None},
        {"preset": None, "path": "/a/folder"},
    ):
        same = plan | {"model": plan["model"] | change}
        assert "made for a checkpoint of digest" not in rendered(same, records, tmp_path)[0]


@pytest.mark.parametrize("blocks", [1, 2])
def test_few_blocks_are_reported_as_what_they_are(blocks: int, tmp_path: Path) -> None:
    plan = make_plan(one_at_a_time(), blocks)
    _, html = rendered(plan, make_records(plan, SPEEDUPS), tmp_path)
    parse(html)
    assert ("no interval" in html) == (blocks == 1)


@pytest.mark.parametrize("kept", ["none", "failed", "no baseline", "baseline only"])
def test_a_study_that_went_wrong_is_still_reported(kept: str, tmp_path: Path) -> None:
    plan = make_plan(one_at_a_time(), 2)
    records = make_records(plan, SPEEDUPS)
    if kept == "none":
        records = []
    for record in [record for record in records if record["kind"] == "launch"]:
        wrong = kept == "failed" or (record["cell"] == "baseline") == (kept == "no baseline")
        if wrong:
            record |= {"status": "failed", "reason": "out of memory"}
    markdown, html = rendered(plan, records, tmp_path)
    parse(html)
    assert "No answer" in markdown
    assert "No answer" in html
    assert (kept == "none") == ("out of memory" not in html)
    print_table(analyse(records, plan), Console(file=io.StringIO(), width=80))


def test_a_factorial_shows_company_and_interactions(tmp_path: Path) -> None:
    plan = make_plan(factorial(), 3)
    markdown, html = rendered(
        plan,
        make_records(plan, SPEEDUPS, interactions={("prefix_cache", "batching"): 1.3}),
        tmp_path,
    )
    assert {"factors.svg", "interactions.svg"} <= {
        path.name for path in (tmp_path / "figures").iterdir()
    }
    parse(html)
    assert "Shapley's share" in markdown
    assert "help each other" in markdown
    # A report rendered again into the same folder leaves no picture of the old one.
    other = make_plan(one_at_a_time(), 3)
    rendered(other, make_records(other, SPEEDUPS), tmp_path)
    assert "interactions.svg" not in {path.name for path in (tmp_path / "figures").iterdir()}


def printed(study: Study, verbose: bool = False) -> list[str]:
    """The lines of the result on a terminal of 80 columns."""
    plan, records = study
    console = Console(file=io.StringIO(), width=80, record=True)
    print_table(analyse(records, plan), console, verbose=verbose)
    return console.export_text().split("\n")


def test_the_whole_table_fits_80_columns(study: Study) -> None:
    lines = printed(study, verbose=True)
    text = "\n".join(lines)
    row = next(line for line in lines if line.startswith(" batching=continuous"))
    assert re.fullmatch(r" batching=continuous +×2\.\d\d +2\.\d\d–2\.\d\d faster +7 steps\s*", row)
    assert "not applicable: cuda_graphs=on: needs a CUDA GPU" in text
    assert " all off / HF" in text
    assert "all off: prefix_cache=off, batching=static, tensor_parallel_size=1" in text
    assert "A/A twin: all off run a second time; what it shows is noise" in text
    assert "Output: equivalent. Every judged token passed the gate (" in text
    assert max(map(len, lines)) <= 80


def test_the_answer_comes_first_on_the_terminal(study: Study) -> None:
    lines = printed(study)
    assert re.match(
        r"scaled: all on ×\d\.\d+ faster; best alone batching=continuous ×2\.\d+ faster", lines[5]
    )
    assert re.match(r"Synthetic 2-core, 2 cores, tiny in float32, 20\d\d-\d\d-\d\d", lines[1])
    assert lines[2].rstrip() == "scaled: 8 requests, prompt 12 to 32, output 12 to 32 tokens"
    assert lines[3].rstrip() == (
        "shared: 8 requests, prompt 64 of 2 prefixes + 16 to 32, output 4 to 16 tokens"
    )
    output = next(line for line in lines if line.startswith("Output: equivalent. "))
    assert "identical to all off in 24 of 41 launches on scaled and" in " ".join(lines)
    table = next(i for i, line in enumerate(lines) if line.startswith("relative to all off"))
    assert lines.index(output) < table
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("name", ["cpu-two-cores/ablate", "h200/ablate", "h200-x2/ablate"])
def test_a_published_study_fits_a_screen(name: str) -> None:
    """With the lines that say where to look, which the command prints below it: a screen of about 40."""
    plan, file = read_for_report(PUBLISHED / name)
    lines = printed((plan, file.records))
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 44
    rows = [line for line in lines if re.match(ROW, line)]
    assert 8 <= len(rows) <= MOST_ROWS + 1
    everything = printed((plan, file.records), verbose=True)
    assert {row.split()[0] for row in rows} <= {
        line.split()[0] for line in everything if line.split()
    }
    assert sum("A/A twin" in row for row in rows) == len(plan["workloads"]), "what noise looks like"
    left = next(line for line in lines if "more: --verbose shows all" in line)
    every = [line for line in everything if re.match(ROW, line)]
    assert left.startswith(f"and {len(every) - len(rows)} rows more"), "what --verbose adds"


@pytest.mark.parametrize("name", ["cpu-two-cores/ablate", "h200/ablate"])
def test_no_decided_row_is_hidden(name: str) -> None:
    """All faster and slower rows, and those that the answer names, stand in the short table; the other
    rows are shared among the workloads.
    """
    plan, file = read_for_report(PUBLISHED / name)
    analysis = analyse(file.records, plan, file.notes)
    rows = list(_rows(analysis, verbose=False))
    shown = _fitting(analysis, rows)
    decided = [row for row in rows if row.effect["verdict"] in ("faster", "slower")]
    assert decided
    assert all(row in shown for row in decided)
    for line in answer_lines(analysis):
        if "; best alone " in line:
            workload, best = line.split(":")[0], line.split("; best alone ")[1].split(" ")[0]
            named = {best, f"{best.removesuffix('=on')}, alone"}
            assert any(row.workload == workload and row.name in named for row in shown), line
    by_workload = [sum(row.workload == workload for row in shown) for workload in plan["workloads"]]
    assert max(by_workload) - min(by_workload) <= 1, by_workload


@pytest.mark.parametrize("name", ["cpu-two-cores/compare-vllm", "h200/compare-vllm"])
def test_a_comparison_shows_everything_on_beside_the_other_engines(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On each workload, also where it is undecided and the screen is full."""
    monkeypatch.setattr("reports.page.table.MOST_ROWS", 0)
    plan, file = read_for_report(PUBLISHED / name)
    analysis = analyse(file.records, plan, file.notes)
    rows = list(_rows(analysis, verbose=False))
    for row in rows:
        row.effect["verdict"] = "inconclusive"
    asked = [row for row in rows if "reference" in row.effect and row.name.startswith("all on / ")]
    assert {row.workload for row in asked} == set(plan["workloads"])
    assert all(row in _fitting(analysis, rows) for row in asked)


@pytest.mark.parametrize("verbose", [False, True])
def test_the_legend_is_of_what_is_shown(verbose: bool) -> None:
    plan, file = read_for_report(PUBLISHED / "cpu-two-cores/ablate")
    text = " ".join(line.strip() for line in printed((plan, file.records), verbose))
    assert "suggestive: not significant after correction for 14 tests" in text
    assert "sums: over all ranks" in text
    assert "replays" not in text, "no unit that no row has"
    assert "gate: did" not in text, "no column of the gate, no legend of it"
    assert ("variance:" in text) == verbose


def test_the_command_names_what_it_left_out_and_refuses_what_it_cannot_read(
    study: Study, tmp_path: Path
) -> None:
    plan, records = study
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    path = tmp_path / "records.jsonl"
    path.write_text(
        "".join(json.dumps(record) + "\n" for record in [*records, records[0]]) + '{"kind": "la'
    )
    done = CliRunner().invoke(app, ["render", str(tmp_path), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    html = (tmp_path / "out" / "report.html").read_text()
    for note in ("truncated last line", "1 duplicated line, taken once"):
        assert note in done.stderr
        assert note in html
    path.write_text(json.dumps(records[0] | {"schema": 2}) + "\n")
    refused = CliRunner().invoke(app, ["render", str(tmp_path)])
    assert refused.exit_code == 2
    assert "line 1: schema 2 is not supported" in refused.stderr


def test_the_command_to_reproduce_names_overrides_and_quotes_them() -> None:
    plan = make_plan(one_at_a_time(), 1, overrides={"design.blocks": 2, "title": "a b"})
    plan["model"] |= {"preset": None, "path": "/models/my qwen"}
    command = reproduce_command(plan)
    assert command == (  # make would take a word with a space for two
        ".venv/bin/python -m experiments ablate --study synthetic --profile cpu --model '/models/my qwen' "
        "--set design.blocks=2 --set 'title=a b'"
    )
    plan = make_plan(
        one_at_a_time(),
        1,
        overrides={"workloads.scaled.prompt_tokens": [4, 8], "workloads.scaled.ignore_eos": True},
    )
    words = shlex.split(reproduce_command(plan))
    assert words[:2] == ["make", "ablate"]
    assert words[-1] == "SET=workloads.scaled.prompt_tokens=[4,8] workloads.scaled.ignore_eos=true"


def test_a_figure_on_a_page_is_named_themed_and_has_ids_of_its_own() -> None:
    drawn = (
        '<svg width="720pt" height="90pt" viewBox="0 0 720 90"><defs><clipPath id="p1"/></defs>'
        f'<g clip-path="url(#p1)"><use href="#m1" style="fill: {LIGHT["ink"]}"/>'
        f"<text>a &lt; b {LIGHT['ink']}</text></g></svg>"
    )
    svg = ElementTree.fromstring(drawn)
    root = ElementTree.fromstring(inline(svg, "forest", "T & t", "D <d>", "wide"))
    assert root.attrib == {
        "viewBox": "0 0 720 90",
        "class": "wide",
        "role": "img",
        "aria-labelledby": "forest-title forest-desc",
    }
    assert [(child.tag, child.get("id"), child.text) for child in root[:2]] == [
        ("title", "forest-title", "T & t"),
        ("desc", "forest-desc", "D <d>"),
    ]
    assert root.find("defs/clipPath").get("id") == "forest-p1"  # type: ignore[union-attr]
    (group,) = root.findall("g")
    assert group.get("clip-path") == "url(#forest-p1)"
    assert group[0].attrib == {"href": "#forest-m1", "style": "fill: var(--ink)"}
    assert group[1].text == f"a < b {LIGHT['ink']}", "text with a colour's characters stays"


def test_a_long_label_takes_several_lines() -> None:
    assert lines("all-but-attention_backend", 29) == ["all-but-attention_backend"]
    long = "all+tensor_parallel_size=2+all_reduce=symmetric_memory"
    assert lines(long, 29) == ["all+tensor_parallel_size=2", "+all_reduce=symmetric_memory"]
    assert lines("reference: vLLM 0.33.0 in one process", 29) == [
        "reference: vLLM 0.33.0 in one",
        "process",
    ]
    assert lines("a" * 30, 10) == ["aaaaaaaaa…"], "a word that fits no line is cut, and says so"


def test_a_figure_as_a_file_says_what_it_shows() -> None:
    with style():
        figure, axes = canvas(360, 90, 10, 10, 20)
        axes.text(0, 0.5, "'DejaVu Sans' <b> & $x$")
    drawn = to_svg(figure)
    assert {element.tag for element in drawn.iter()}.isdisjoint({"metadata", "style"})
    root = ElementTree.fromstring(standalone(drawn, "T & t", "D <d>"))
    svg = "{http://www.w3.org/2000/svg}"
    assert [child.tag for child in root[:3]] == [f"{svg}title", f"{svg}desc", f"{svg}rect"]
    assert (root[0].text, root[1].text) == ("T & t", "D <d>")
    words = "'DejaVu Sans' <b> & $x$"  # text that looks like a font stays
    label = next(text for text in root.iter(f"{svg}text") if text.text == words)
    assert FONT in label.get("style", "")
    assert "DejaVu" not in label.get("style", "")
