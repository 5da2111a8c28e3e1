"""Merges several folders of one plan, from one host or several, into one. Standard library only.

This is for runs that each started with an empty folder, or for copies that were each resumed; a
folder that was copied and then resumed needs no merge. The result does not depend on the order of
the folders, and can be merged again or resumed.

- A launch is identified by its name, its boot and its start time; a record that is in several
  folders is taken once.
- A block counts from one place (boot, GPUs) only: the first that finished all of it, else the one
  that finished most of it. The records of other places are kept and marked superseded.
- Attempts are renumbered, because each folder starts at 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from experiments.records import store
from experiments.records.store import Record, RecordError
from experiments.records.types import LaunchRecord, Plan, SupersededRecord, TokenLine

_RANK = {"error": 0, "pass": 1, "ok": 1, "fail": 2}
Identity = tuple[str, str, str]
Place = tuple[str, str]


def merge(folders: Iterable[Path], out: Path) -> list[str]:
    """Writes one folder from several of the same plan, and returns notes for the user. Raises
    RecordError.
    """
    sources = sorted({folder.resolve() for folder in folders})
    if out.resolve() in sources:
        raise RecordError(f"{out} is one of the folders to merge; give a new folder")
    if (out / store.RECORDS).exists():
        raise RecordError(
            f"{out} already holds records; give a new folder, or remove this one if it was merged from the others"
        )
    plan = _common_plan(sources)
    found = [store.read(folder) for folder in sources]
    _check_code(sources, found)
    tokens = {
        line["digest"]: line["tokens"] for folder in sources for line in store.token_lines(folder)
    }
    merged, notes = combine(plan, found)
    lines: list[TokenLine] = [
        {"digest": digest, "tokens": tokens[digest]} for digest in sorted(tokens)
    ]
    reports = {
        path.name: path.read_text()
        for folder in sources
        for path in folder.glob(store.ENVIRONMENTS)
    }
    for name, report in reports.items():
        store.write_whole(out / name, report)
    store.write_whole(out / store.TOKENS, _text(lines))
    store.write_plan(plan, out / store.PLAN)
    # written last: a folder with records is complete
    store.write_whole(out / store.RECORDS, _text(merged))
    return notes


def of_one_plan(folders: Iterable[Path]) -> list[Path]:
    """The folders whose plan is also that of another folder. Raises RecordError."""
    hashes = {folder: store.read_plan(folder / store.PLAN)["plan_hash"] for folder in folders}
    return [folder for folder, plan in hashes.items() if list(hashes.values()).count(plan) > 1]


def combine(plan: Plan, folders: list[list[Record]]) -> tuple[list[Record], list[str]]:
    """The merged records of several folders, and notes for the user."""
    launches: dict[Identity, LaunchRecord] = {}
    superseded: dict[Identity, SupersededRecord] = {}
    others: dict[str, Record] = {}
    for found in folders:
        own = {(r["launch"], r["attempt"]): _identity(r) for r in found if r["kind"] == "launch"}
        for record in found:
            if record["kind"] == "launch":
                launches.setdefault(_identity(record), record)
            elif record["kind"] == "superseded":
                if (record["launch"], record["attempt"]) in own:
                    superseded.setdefault(own[record["launch"], record["attempt"]], record)
            else:
                others.setdefault(json.dumps(record, sort_keys=True), record)
    ordered = sorted(launches, key=lambda identity: (launches[identity]["started_at"], identity))
    attempts: dict[str, int] = {}
    numbered: dict[Identity, LaunchRecord] = {}
    for identity in ordered:
        attempts[identity[0]] = attempts.get(identity[0], 0) + 1
        numbered[identity] = {**launches[identity], "attempt": attempts[identity[0]]}
    marked = {
        identity: _mark(plan, numbered[identity], superseded[identity]["reason"])
        for identity in ordered
        if identity in superseded
    }
    notes = []
    for block in sorted({entry["block"] for entry in plan["launches"]}):
        done = [
            numbered[i] for i in ordered if i not in marked and numbered[i]["status"] in store.DONE
        ]
        # failed launches never count, and do not record their GPU
        alive = [record for record in done if record["block"] == block]
        places = {_place(record) for record in alive}
        if len(places) < 2:
            continue
        chosen = _choose(plan, block, alive)
        reason = f"block {block} is counted from another run (boot {chosen[0]}): a block must come from one place"
        marked |= {_identity(r): _mark(plan, r, reason) for r in alive if _place(r) != chosen}
        notes.append(
            f"block {block} was started in {len(places)} places; it is counted from {_name(alive, chosen)}"
        )
    machines = sorted({_hardware(numbered[i]) for i in ordered if i not in marked})
    if len(machines) > 1:
        notes.append(
            "different hardware: "
            + "; ".join(machines)
            + ". Ratios are taken within blocks, but effects may depend on the hardware."
        )
    tail = sorted(others.values(), key=lambda r: json.dumps(r, sort_keys=True))
    # A later gate or price record replaces an earlier one, so that an error does not replace a result.
    tail.sort(key=lambda r: _RANK[r["status"]] if r["kind"] in ("gate", "price") else 0)
    return [
        *numbered.values(),
        *(marked[identity] for identity in ordered if identity in marked),
        *tail,
    ], notes


def _choose(plan: Plan, block: int, alive: list[LaunchRecord]) -> Place:
    size = sum(entry["block"] == block for entry in plan["launches"])

    def rank(place: Place) -> tuple[bool, int, str, Place]:
        own = [record for record in alive if _place(record) == place]
        done = len({record["launch"] for record in own})
        is_whole = done == size
        return (
            not is_whole,
            0 if is_whole else -done,
            min(record["started_at"] for record in own),
            place,
        )

    return min({_place(record) for record in alive}, key=rank)


def _common_plan(folders: list[Path]) -> Plan:
    plans = {folder: store.read_plan(folder / store.PLAN) for folder in folders}
    first, *rest = plans
    for folder in rest:
        if plans[folder]["plan_hash"] != plans[first]["plan_hash"]:
            raise RecordError(
                f"{folder} holds plan {plans[folder]['plan_hash'][:12]}, {first} plan {plans[first]['plan_hash'][:12]}: "
                "only folders of one plan can be merged. Write the plan once, and copy that file to every host."
            )
    return plans[first]


def _check_code(folders: list[Path], found: list[list[Record]]) -> None:
    codes = {
        record["provenance"]["code_digest"]: folder
        for folder, read in zip(folders, found, strict=True)
        for record in read
        if record["kind"] == "launch"
    }
    if len(codes) > 1:
        listed = ", ".join(f"{digest[:12]} in {folder}" for digest, folder in sorted(codes.items()))
        raise RecordError(
            f"the folders were made with different versions of the code ({listed}), which must not be compared"
        )


def _mark(plan: Plan, record: LaunchRecord, reason: str) -> SupersededRecord:
    return {
        "kind": "superseded",
        "schema": store.SCHEMA,
        "study": plan["study"]["name"],
        "plan_hash": plan["plan_hash"],
        "launch": record["launch"],
        "attempt": record["attempt"],
        "reason": reason,
    }


def _identity(record: LaunchRecord) -> Identity:
    return record["launch"], record["boot_id"], record["started_at"]


def _place(record: LaunchRecord) -> Place:
    return record["boot_id"], record["provenance"].get("environment", {}).get(
        "CUDA_VISIBLE_DEVICES", ""
    )


def _name(alive: list[LaunchRecord], place: Place) -> str:
    first = next(record for record in alive if _place(record) == place)
    return f"{first['provenance']['hostname']}, boot {place[0]}, started {first['started_at']}"


def _hardware(record: LaunchRecord) -> str:
    made_on = record["provenance"]
    gpus = sorted({gpu["name"] for gpu in made_on["gpus"]})
    return f"{made_on['cpu']['model']}, {made_on['cpu']['cores']} cores" + "".join(
        f" + {gpu}" for gpu in gpus
    )


def _text(lines: Sequence[Record | TokenLine]) -> str:
    return "".join(
        json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n" for line in lines
    )
