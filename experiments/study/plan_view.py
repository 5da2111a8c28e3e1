"""The summary of a plan that is printed before it runs: design, launches, expected time, what cannot
run on this machine, aliases, and the smallest effect it can detect.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path

from experiments.host.provenance import cpu_cores
from experiments.records.cell_names import shown_names
from experiments.records.types import NotApplicable, Plan, PlannedProfile, PlannedStudy
from experiments.study import block_count, designs
from experiments.study.plan import NotHereError, outline
from experiments.study.spec import Profile, Study


def lines(plan: Plan, earlier: Iterable[Path]) -> list[tuple[str, str | None]]:
    """(line, style) of everything a user should know before a plan runs. earlier: folders of earlier
    executions, latest first.
    """
    study, model = plan["study"], plan["model"]
    name = model["preset"] or model["path"]
    said: list[tuple[str, str | None]] = [
        (f"study    {study['name']}: {study['question'].strip()}", None),
        (f"machine  {_machine(plan['profile'])}; model {name}, {model['dtype']}", None),
        (f"design   {_design(plan)}", None),
    ]
    launches = f"{len(plan['launches'])} launches ({study['design']['blocks']} blocks of {len(plan['cells'])} cells)"
    expected = f"at {study['measurement']['launch_s']:g} s each: about {duration(plan['expected_s'])}, plus the gate"
    said.append((f"plan     {launches} {expected}; hash {plan['plan_hash'][:12]}", None))
    if sized := plan.get("sized"):
        share = (
            "outputs at full length"
            if sized["share_of_answers"] == 1
            else f"outputs cut to {sized['share_of_answers']:.0%} of their length"
        )
        budget_s = sized["budget_s"]
        too_long = budget_s is not None and plan["expected_s"] > budget_s
        within = f" to fit {duration(budget_s)}" if budget_s and not too_long else ""
        said.append(
            (
                f"sized    {share}, {sized['blocks']} blocks{within}; speeds {plan['profile']['speeds']}",
                None,
            )
        )
        if budget_s is not None and too_long:
            said.append(
                (
                    f"long     this model takes longer than the {duration(budget_s)} that the study is made for; for less work: "
                    "--set workloads.NAME.num_requests=8, for each workload",
                    "yellow",
                )
            )
    if price := plan.get("price"):
        margins = ", ".join(f"{metric} {margin:g}" for metric, margin in price["margins"].items())
        held = f"{price['prompts']['num_requests']} prompts of {price['prompts']['prompt_tokens']:,} tokens in all"
        said.append(
            (f"price    lossy: {', '.join(price['cells'])}; margins {margins}; {held}", None)
        )
    factors, generators = list(study["factors"]), study["design"]["generators"]
    if generators:
        words = ", ".join(
            f"{factor} = {' * '.join(parents)}" for factor, parents in generators.items()
        )
        said.append(
            (f"fraction resolution {designs.resolution(generators)}, generators {words}", None)
        )
        said += [
            (f"aliases  {mixed} (cannot be separated)", None)
            for mixed in designs.say_aliases(factors, generators)
        ]
    if (noise := block_count.previous_noise(plan, earlier)) is not None:
        said.append((f"power    {_power(study, *noise)}", None))
    everything = [
        f"{factor}={level}"
        for cell in plan["cells"].values()
        if cell["role"] == "all"
        for factor, level in cell["levels"].items()
    ]
    return said + [(line, "yellow") for line in skipped(plan["not_applicable"], everything)]


MOST_DETECTABLE = 10.0
"""A relative change beyond which a percentage tells nothing."""
_DESIGNS = {
    "one_at_a_time": "each level alone",
    "add_one_in": "each level alone, and everything on",
    "leave_one_out": "everything on, and each switch left out",
    "both": "each switch alone, and left out of everything on",
    "full_factorial": "every combination of levels",
    "fractional_factorial": "a balanced part of all combinations",
    "listed": "the study's own cells",
}


def _design(plan: Plan) -> str:
    """The design in words, and the configurations that it makes."""
    kind, names = plan["study"]["design"]["kind"], shown_names(plan).values()
    return f"{kind} ({_DESIGNS[kind]}); {len(names)} configurations: {', '.join(names)}"


def skipped(not_applicable: list[NotApplicable], everything: Iterable[str] = ()) -> list[str]:
    """What cannot run, grouped by reason, in lines of at most 80 columns. everything: the switches
    that are part of everything on, such as "overlap=on".
    """
    by_reason: dict[str, list[str]] = {}
    for entry in not_applicable:  # a level of a factor, or a cell with its levels
        is_cell = "=" in str(entry["level"])
        what = str(entry["factor"]) if is_cell else f"{entry['factor']}={entry['level']}"
        stays = "" if what not in everything else " It stays part of everything on."
        by_reason.setdefault(entry["reason"] + stays, []).append(what)
    lines: list[str] = []
    for reason, names in by_reason.items():
        lines += textwrap.wrap(
            f"skipped  {', '.join(names)}: {reason}",
            80,
            subsequent_indent=" " * 9,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines


def _machine(profile: PlannedProfile) -> str:
    """Name and speeds of the hardware, and where the speeds come from."""
    speeds = f"{profile['bandwidth_bytes_per_s'] / 1e9:,.0f} GB/s, {profile['peak_flops'] / 1e12:,.3g} TFLOP/s"
    memory = f"{profile['kv_cache_memory_bytes'] / 2**30:.3g} GiB of KV cache"
    return (
        f"profile {profile['name']} ({profile['title']}: {speeds}, {profile['speeds']}; {memory})"
    )


def in_short(study: Study, profile: Profile) -> str:
    """The launches and the time of a study on a profile, or why it cannot run there, in one line.
    Raises SpecError.
    """
    hardware: PlannedProfile = profile.model_dump(exclude={"match"})  # type: ignore[assignment]
    hardware["cpu_cores"] = profile.cpu_cores or cpu_cores()
    try:
        shape = outline(study, hardware)
    except NotHereError as error:
        return (
            f"not on profile {profile.name}: {str(error).removeprefix(study.source).lstrip(': ')}"
        )
    lost = f", {len(shape.not_applicable)} skipped" if shape.not_applicable else ""
    return (
        f"{study.design.kind}, {shape.launches} launches ({shape.blocks} blocks of {len(shape.cells)} cells{lost}), "
        f"about {duration(shape.expected_s)}"
    )


def cost(study: Study, profile: Profile) -> tuple[str, str] | None:
    """The number of launches and the time of a study on a profile; None if it cannot run there.
    Raises SpecError.
    """
    hardware: PlannedProfile = profile.model_dump(exclude={"match"})  # type: ignore[assignment]
    hardware["cpu_cores"] = profile.cpu_cores or cpu_cores()
    try:
        shape = outline(study, hardware)
    except NotHereError:
        return None
    return str(shape.launches), duration(shape.expected_s)


def duration(seconds: float) -> str:
    """Seconds as minutes or hours."""
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _power(study: PlannedStudy, noise: float, folder: Path) -> str:
    """The smallest effect that the study can detect if it is as noisy as the last one."""
    least = block_count.detectable(noise, study["design"]["blocks"], study["alpha"])
    if least > MOST_DETECTABLE:  # a percentage of that size tells nothing
        return (
            f"{study['design']['blocks']} blocks are too few to detect any change at alpha = {study['alpha']:g}, if the "
            f"noise between blocks is as in {folder.name} ({noise:.1%})"
        )
    return (
        f"detects changes of {least:.1%} or more with probability {block_count.POWER:.0%}, if the noise between blocks is as "
        f"in {folder.name} ({noise:.1%}); the end of the run says what was achieved"
    )
