"""The schemas of studies and hardware profiles, which are YAML files. An unknown key is an error
that names the file, the key and what is allowed.

`experiments.study.plan` expands a study and a profile into a plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PrivateAttr, field_validator, model_validator

from experiments import workloads
from experiments.engines import ENGINES
from experiments.load import objective
from experiments.price import rules
from experiments.records.factor_levels import Level, level_name
from experiments.records.types import Config, JsonObject, Params
from experiments.study import designs, yaml_files
from experiments.study.protocol import (
    Design,
    Load,
    Measurement,
    Sizing,
    Statistics,
    Strict,
    Validity,
)
from experiments.study.yaml_files import suggest
from nanovllm.config import LEVELS

ROOT = Path(__file__).resolve().parents[2]
STUDIES = ROOT / "ablations" / "studies"
PROFILES = Path(__file__).resolve().parent / "profiles"
FACTORS: dict[str, tuple[Level, ...]] = {
    name: tuple(map(level_name, levels)) for name, levels in LEVELS.items()
}
"""All factors and their levels as written in studies, the baseline first."""
METRICS = (
    "output_tokens_per_s",
    *(
        f"time_{of}_p{percentile}_s"
        for of in ("to_first_token", "per_output_token")
        for percentile in (50, 90, 99)
    ),
)

LOAD_METRICS = (
    "goodput_requests_per_s",
    "sustainable_requests_per_s",
    *(
        f"{of}_p{percentile}_s"
        for of in ("inter_token_latency", "end_to_end")
        for percentile in (50, 90, 99)
    ),
)
"""Those of studies whose requests arrive over time."""

Dtype = Literal["float32", "bfloat16", "float16"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+=-]*$")]


class Workload(Strict):
    """The kind of a workload and its parameters (experiments/workloads.py). In YAML they share one
    mapping; `params` holds all keys but `kind`.
    """

    kind: str
    params: Params

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "kind" not in given:
            raise ValueError(
                f"a workload is a mapping with `kind` ({', '.join(workloads.DEFAULTS)}, trace) and that kind's parameters"
            )
        params = {key: value for key, value in given.items() if key != "kind"}
        return {"kind": given["kind"], "params": workloads.check_params(given["kind"], params)}

    @property
    def over_time(self) -> bool:
        """Whether requests arrive over time."""
        return self.kind == "trace" or "arrivals" in self.params

    @property
    def searched(self) -> bool:
        """Whether each launch searches for the highest rate."""
        return "search" in self.params.get("arrivals", {})


class Price(Strict):
    """How far configurations with a lossy optimization may be from the unquantized reference, fixed
    before anything runs (experiments/price/).

    margins: by metric: `kl` (nats per token), `top_choice` (share of tokens), `log_perplexity`; those
    not given keep their defaults. level: of the one-sided tests, Holm-adjusted over the metrics.
    prompts: the held prompts, written as a workload; their answers are not generated.
    """

    margins: dict[str, float] = rules.MARGINS
    level: float = Field(default=rules.LEVEL, ge=0.001, le=0.2)
    prompts: Workload = Field(default=rules.PROMPTS, validate_default=True)  # type: ignore[assignment]

    @field_validator("margins", mode="before")
    @classmethod
    def _complete(cls, given: Any) -> dict[str, float]:
        return rules.check_margins(given)

    @field_validator("prompts")
    @classmethod
    def _held(cls, prompts: Workload) -> Workload:
        if prompts.over_time:
            raise ValueError(
                "held prompts are read one by one and do not arrive over time; remove `arrivals`, and use another kind than trace"
            )
        return prompts


class Factor(Strict):
    """One optimization that a study varies.

    levels: what is compared with the baseline; `all` uses the last one. baseline: defaults to the
    engine's. workloads: those on which the factor can have an effect; defaults to all. in_all:
    false for a factor that `all` leaves at its baseline: it is measured alone and on top of `all`.
    """

    levels: list[Level] = Field(min_length=1)
    baseline: Level | None = None
    in_all: bool = True
    workloads: list[Name] = []

    @field_validator("levels", mode="before")
    @classmethod
    def _name_levels(cls, given: Any) -> Any:
        return [level_name(value) for value in (given if isinstance(given, list) else [given])]

    @field_validator("baseline", mode="before")
    @classmethod
    def _name_baseline(cls, given: Any) -> Any:
        if given is None:
            raise ValueError(
                "must not be empty; give a level, or remove the key to use the engine's baseline"
            )
        return level_name(given)


class Cell(Strict):
    """A configuration in addition to those of the design: levels of factors, or another engine as a
    reference.

    config: engine settings that differ from the study's.
    """

    engine: str = "nanovllm"
    role: Literal["treatment", "all", "reference"]
    levels: dict[str, Level] = {}
    config: Config = {}

    @field_validator("levels", mode="before")
    @classmethod
    def _name_levels(cls, given: Any) -> Any:
        return (
            {factor: level_name(level) for factor, level in given.items()}
            if isinstance(given, dict)
            else given
        )

    @field_validator("engine")
    @classmethod
    def _known_engine(cls, engine: str) -> str:
        if engine not in ENGINES and "." not in engine:
            raise ValueError(
                f"unknown engine {engine!r}{suggest(engine, ENGINES)}; "
                f"allowed: {', '.join(ENGINES)}, or the dotted path of a module with an Adapter"
            )
        return engine


class Comparison(Strict):
    """A comparison of a cell of the study's engine with cells of others (see
    experiments/launch/fairness.py).

    rule: with `best`, both share the checkpoint, dtype, workloads and KV-cache size; with
    `like-for-like` also the limits and the optimizations.
    """

    ours: Name
    theirs: list[Name] = Field(min_length=1)
    rule: Literal["best", "like-for-like"] = "best"


class EngineSettings(Strict):
    """Engine settings that all cells share. `None` is taken from the profile."""

    max_num_seqs: int = Field(default=64, ge=1, lt=2**31)
    max_num_batched_tokens: int = Field(default=1024, ge=1, lt=2**31)
    max_model_len: int = Field(default=1024, ge=1, lt=2**31)
    block_size: int = Field(default=16, ge=1, lt=2**31)
    kv_cache_memory_bytes: int | None = Field(default=None, ge=1, lt=2**63)


class ModelChoice(Strict):
    """The checkpoint (a preset of nanovllm.models.checkpoint, or a folder) and the dtype."""

    preset: str | None = None
    path: str | None = None
    dtype: Dtype

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.preset is None) == (self.path is None):
            raise ValueError("give either `preset` or `path`")
        return self


class Study(Strict):
    """A question, the factors to vary, and the workloads to measure.

    fixed: levels of optimizations that are not factors, for all cells of the engine under study;
    those not listed stay at their baselines.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    title: str = Field(default_factory=lambda data: data["name"].replace("-", " "))
    question: str = "How much faster does each level make the engine?"
    engine: str = "nanovllm"
    model: ModelChoice | None = None
    metric: Literal[METRICS + LOAD_METRICS] = METRICS[0]  # type: ignore[valid-type]
    smallest_effect: float = Field(default=0.05, gt=0, lt=1)
    alpha: float = Field(default=0.05, gt=0, lt=1)
    design: Design = Design()
    measurement: Measurement = Measurement()
    sizing: Sizing | None = None
    statistics: Statistics = Statistics()
    settings: EngineSettings = EngineSettings()
    factors: dict[str, Factor] = Field(min_length=1)
    fixed: dict[str, Level] = {}
    workloads: dict[Name, Workload] = Field(min_length=1)
    cells: dict[Name, Cell] = {}
    comparisons: dict[Name, Comparison] = {}
    validity: Validity = Validity()
    load: Load | None = None
    price: Price | None = None
    gate: JsonObject = {}
    _source: str = PrivateAttr(default="")

    @property
    def source(self) -> str:
        """The name of this study in messages: its file, if it was read from one."""
        return self._source or f"study {self.name}"

    @field_validator("factors")
    @classmethod
    def _known_factors(cls, factors: dict[str, Factor]) -> dict[str, Factor]:
        return {
            name: factor.model_copy(update={"baseline": _check_levels(name, factor)})
            for name, factor in factors.items()
        }

    @field_validator("fixed", mode="before")
    @classmethod
    def _name_fixed(cls, given: Any) -> Any:
        return (
            {name: level_name(level) for name, level in given.items()}
            if isinstance(given, dict)
            else given
        )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name, level in self.fixed.items():
            free = [factor for factor in FACTORS if factor not in self.factors]
            if name not in free:
                raise ValueError(
                    f"fixed.{name}: not an optimization, or already a factor of this study"
                    f"{suggest(name, free)}; allowed: {', '.join(free)}"
                )
            if level not in FACTORS[name]:
                raise ValueError(
                    f"fixed.{name}: {level!r} is not a level{_meant(level, FACTORS[name])}; allowed: {_listed(FACTORS[name])}"
                )
        for name, factor in self.factors.items():
            if missing := [w for w in factor.workloads if w not in self.workloads]:
                raise ValueError(
                    f"factors.{name}.workloads: {missing[0]!r} is not a workload of this study"
                    f"{suggest(missing[0], self.workloads)}; "
                    f"allowed: {', '.join(self.workloads)}"
                )
        if self.design.kind in designs.FACTORIALS and (alone := sorted(self.apart())):
            raise ValueError(
                f"factors.{alone[0]}.in_all: false has no meaning in design.kind {self.design.kind}, which combines "
                "all factors; allowed: add_one_in, leave_one_out, both"
            )
        if self.design.kind == "listed" and not self.cells:
            raise ValueError(
                "design.kind: listed runs only the study's `cells`, and it has none; add some, or use another kind"
            )
        made = {"baseline", "aa", *self._made_by_design()}
        for name, cell in self.cells.items():
            if name in made:
                raise ValueError(
                    f"cells.{name}: the design makes a cell of this name; choose another"
                )
            if (cell.role == "reference") == (cell.engine == self.engine):
                raise ValueError(
                    f"cells.{name}: role {cell.role!r} does not fit engine {cell.engine!r}; the role must be 'reference' for "
                    f"engines other than the study's, {self.engine}, and only for those"
                )
            for varied, level in cell.levels.items():
                where = f"cells.{name}.levels"
                if varied not in self.factors:
                    raise ValueError(
                        f"{where}: {varied!r} is not a factor of this study{suggest(varied, self.factors)}; "
                        f"allowed: {', '.join(self.factors)}"
                    )
                if level not in FACTORS[varied]:
                    raise ValueError(
                        f"{where}.{varied}: {level!r} is not a level{_meant(level, FACTORS[varied])}; "
                        f"allowed: {_listed(FACTORS[varied])}"
                    )
            if cell.role != "reference" and not cell.levels:
                raise ValueError(f"cells.{name}: a cell of role {cell.role} needs `levels`")
        for name, comparison in self.comparisons.items():
            for cell_name in (comparison.ours, *comparison.theirs):
                if cell_name not in made and cell_name not in self.cells:
                    known = ", ".join(["baseline", "aa", *self.cells])
                    raise ValueError(
                        f"comparisons.{name}: {cell_name!r} is not a cell of this study; allowed: {known}"
                    )
        return self

    @model_validator(mode="after")
    def _load_fits(self) -> Self:
        """What only means something for requests that arrive over time, and what those need."""
        online = [name for name, work in self.workloads.items() if work.over_time]
        slo = self.load.slo if self.load else None
        if self.load is not None and not online:
            raise ValueError(
                "load: no workload of this study has arrivals, so there is no load to judge; add `arrivals` to a workload, or "
                "remove `load`"
            )
        if self.metric in LOAD_METRICS and not online:
            raise ValueError(
                f"metric: {self.metric!r} needs a workload with arrivals; allowed without: {', '.join(METRICS)}"
            )
        searched = [name for name, work in self.workloads.items() if work.searched]
        wanting = [f"workloads.{name}.arrivals.search" for name in searched]
        if self.metric in ("goodput_requests_per_s", "sustainable_requests_per_s"):
            wanting.append("metric")
        if wanting and slo is None:
            raise ValueError(
                f"{wanting[0]}: needs an objective; add `load: {{slo: ...}}` with a preset "
                f"({', '.join(objective.PRESETS)}) or limits in seconds ({', '.join(objective.LIMITS)})"
            )
        if self.metric == "sustainable_requests_per_s" and not searched:
            raise ValueError(
                f"metric: {self.metric!r} needs a workload with arrivals.search; add one, or use goodput_requests_per_s"
            )
        return self

    @model_validator(mode="after")
    def _price_fits(self) -> Self:
        """Margins only mean something beside a configuration that changes the output."""
        known = rules.lossless_levels()
        named = {
            *self.factors,
            *self.fixed,
            *(key for c in self.cells.values() for key in c.config),
        }
        if self.price is not None and not named & set(known):
            raise ValueError(
                "price: no configuration of this study changes the output, so nothing has a price; remove `price`, or vary an "
                f"optimization that does: {', '.join(known) or 'there is none in this version'}"
            )
        return self

    @property
    def load_rules(self) -> Load | None:
        """The rules of the load; None for a study without arrivals."""
        if not any(work.over_time for work in self.workloads.values()):
            return None
        return self.load or Load()

    def baselines(self) -> dict[str, Level]:
        """The baseline level of each factor."""
        return {
            name: FACTORS[name][0] if factor.baseline is None else factor.baseline
            for name, factor in self.factors.items()
        }

    def apart(self) -> frozenset[str]:
        """The factors that `all` leaves at their baseline."""
        return frozenset(name for name, factor in self.factors.items() if not factor.in_all)

    def generators(self, levels: Mapping[str, Sequence[Level]]) -> dict[str, list[str]]:
        """The generators of a fractional factorial over these factors, as stated or chosen; {} for
        other designs. Raises ValueError if there are none.
        """
        if self.design.kind != "fractional_factorial":
            return {}
        if wide := [name for name, found in levels.items() if len(found) != 1]:
            raise ValueError(
                f"factors.{wide[0]}.levels: a fractional factorial has one level besides the baseline, "
                f"not {len(levels[wide[0]])}; keep one, or use kind: full_factorial"
            )
        stated, least = self.design.generators, self.design.resolution
        if not stated:
            return designs.choose_generators(list(levels), least)
        free = [name for name in levels if name not in stated]
        for factor, parents in stated.items():
            where = f"design.generators.{factor}"
            if factor not in levels:
                raise ValueError(
                    f"{where}: not a factor of this study; allowed: {', '.join(levels)}"
                )
            if (
                len(set(parents)) < 2
                or len(set(parents)) < len(parents)
                or not set(parents) <= set(free)
            ):
                raise ValueError(
                    f"{where}: {_listed(parents)}; allowed: two or more different factors that have no generator "
                    f"themselves: {_listed(free)}"
                )
        if (reached := designs.resolution(stated)) < least:
            raise ValueError(
                f"design.generators: their resolution is {reached}, but design.resolution is {least}"
            )
        return {factor: list(parents) for factor, parents in stated.items()}

    def _made_by_design(self) -> Iterable[str]:
        levels = {name: factor.levels for name, factor in self.factors.items()}
        return designs.cells(
            self.design.kind, self.baselines(), levels, self.generators(levels), apart=self.apart()
        )


class Match(Strict):
    """How a machine is recognized: the name of its GPUs as reported by the driver, with `*` as a
    wildcard, and their number.
    """

    gpu_name: str
    num_gpus: int = Field(default=1, ge=1)


class Profile(Strict):
    """Hardware. Bandwidth and peak FLOP/s are per device and bound what any engine can reach;
    `measure` measures them on this machine, once.

    A profile may describe a machine that is not present, to plan for it. On a machine that `match`
    describes, measured values take precedence over the file's. memory_bytes, cpu_cores: None means
    this machine's. kv_cache_memory_bytes: per device; `measure` takes what weights and activations
    leave free, but no more than the workloads can fill. host_op_s: seconds the host needs to issue
    one GPU operation; import_s: seconds to import torch; both are only used to size the work of a
    study. preset, dtype: the model of studies that name none.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    title: str
    device: Literal["cpu", "cuda"]
    num_devices: int = Field(default=1, ge=1)
    match: Match | None = None
    cpu_cores: int | None = Field(default=None, ge=1)
    memory_bytes: int | None = Field(default=None, ge=1)
    bandwidth_bytes_per_s: float | Literal["measure"]
    peak_flops: dict[Dtype, float] | Literal["measure"]
    kv_cache_memory_bytes: Annotated[int, Field(ge=1)] | Literal["measure"]
    host_op_s: float = Field(default=5e-6, gt=0)
    import_s: float = Field(default=2.0, gt=0)
    preset: str
    dtype: Dtype
    note: str = ""


def load_study(source: str | Path, overrides: Iterable[str] = ()) -> tuple[Study, JsonObject]:
    """A study, given by path or by name (a file in ablations/studies), with overrides such as
    "design.blocks=2" applied; also returns the overrides as a mapping.
    """
    path = yaml_files.find(source, STUDIES, "study")
    study, applied = yaml_files.load(Study, path, overrides)
    study._source = yaml_files.named(path, applied)
    return study, applied


def load_profile(source: str | Path) -> Profile:
    """A profile by path or by the name of a file in experiments/study/profiles."""
    return yaml_files.load(Profile, yaml_files.find(source, PROFILES, "profile"))[0]


def _check_levels(name: str, factor: Factor) -> Level:
    """The baseline of a factor. Raises ValueError for a factor or a level that does not exist."""
    if name not in FACTORS:
        raise ValueError(
            f"{name}: unknown factor{suggest(name, FACTORS)}; allowed: {', '.join(FACTORS)}"
        )
    allowed = FACTORS[name]
    baseline = allowed[0] if factor.baseline is None else factor.baseline
    for level in (baseline, *factor.levels):
        if level not in allowed:
            raise ValueError(
                f"{name}: {level!r} is not a level{_meant(level, allowed)}; allowed: {_listed(allowed)}"
            )
    if baseline in factor.levels or len(set(factor.levels)) < len(factor.levels):
        raise ValueError(
            f"{name}: levels {_listed(factor.levels)} must differ from each other and from the baseline, {baseline}, "
            "which runs anyway"
        )
    return baseline


def _meant(level: Level, allowed: Iterable[Level]) -> str:
    return suggest(str(level), map(str, allowed))


def _listed(levels: Iterable[Level]) -> str:
    return ", ".join(map(str, levels))
