"""What `make ablate` must have left behind: records, a gate that passed, a report, verdicts with
intervals, MLflow runs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mlflow.tracking import MlflowClient

ROOT = Path(__file__).parents[1]


def main() -> None:
    folder = max((ROOT / "runs").iterdir(), key=lambda path: path.name)
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    plan = json.loads((folder / "plan.json").read_text())
    launches = [record for record in records if record["kind"] == "launch"]
    require(
        len(launches) == len(plan["launches"]),
        f"{len(launches)} of {len(plan['launches'])} launches recorded",
    )
    require(all(record["status"] == "ok" for record in launches), "a launch is not ok")
    gates = [record for record in records if record["kind"] == "gate"]
    require(any(not gate["is_negative_control"] for gate in gates), "nothing went through the gate")
    require(
        all(gate["status"] == "pass" for gate in gates if not gate["is_negative_control"]),
        "the gate did not pass",
    )

    analysis = json.loads((folder / "report" / "analysis.json").read_text())
    effects = analysis["effects"]
    require(bool(effects), "no effects")
    for effect in effects:
        interval = (
            effect["low"] is not None
            and effect["high"] is not None
            and effect["low"] <= effect["ratio"] <= effect["high"]
        )
        require(
            interval and bool(effect["verdict"]),
            f"{effect['cell']} on {effect['workload']} has a verdict without an interval",
        )
    pages = {
        path.suffix: path
        for path in (folder / "report").iterdir()
        if path.suffix in (".md", ".html")
    }
    require(set(pages) == {".md", ".html"}, f"the report consists of {sorted(pages)}")
    require("<svg" in pages[".html"].read_text(), "the page has no picture")

    client = MlflowClient(tracking_uri=f"sqlite:///{ROOT / 'mlflow.db'}")
    experiments = [e for e in client.search_experiments() if e.name != "Default"]
    runs = client.search_runs([e.experiment_id for e in experiments], max_results=1000)
    nested = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    require(
        len(nested) >= len(launches),
        f"MLflow holds {len(nested)} nested runs for {len(launches)} launches",
    )
    print(
        f"{folder.name}: {len(launches)} launches, {len(gates)} gate records, {len(effects)} effects, {len(runs)} MLflow runs"
    )


def require(condition: bool, complaint: str) -> None:
    if not condition:
        sys.exit(f"check_evidence: {complaint}")


if __name__ == "__main__":
    main()
