"""What a study and a machine are, as written in YAML. Unknown keys are errors that name the file,
the key and what is allowed.

Studies and profiles are only read here; `experiments.study.plan` expands a study on a profile into a
plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PrivateAttr, field_validator, model_validator

from experiments import workloads
from experiments.engines import ENGINES
from experiments.records.factor_levels import Level, level_name
from experiments.study import designs, yaml_files
from experiments.study.protocol import (
    Design,
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
"""Every factor and its levels as studies write them, the baseline first."""
METRICS = (
    "output_tokens_per_s",
    *(
        f"time_{of}_p{percentile}_s"
        for of in ("to_first_token", "per_output_token")
        for percentile in (50, 90, 99)
    ),
)

Dtype = Literal["float32", "bfloat16"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+=-]*$")]


class Workload(Strict):
    """kind and its parameters (experiments/workloads.py); `params` is what is left of the mapping
    once `kind` is taken.
    """

    kind: str
    params: dict[str, Any]

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "kind" not in given:
            raise ValueError(
                f"a workload is a mapping with `kind` ({', '.join(workloads.DEFAULTS)}) and that kind's parameters"
            )
        params = {key: value for key, value in given.items() if key != "kind"}
        return {"kind": given["kind"], "params": workloads.check_params(given["kind"], params)}


class Factor(Strict):
    """One switch that a study varies. levels: what to compare with the baseline, the last one being
    that of everything on.
    baseline: the engine's, if not given. workloads: where it has an opportunity; all of the
    study's, if not given.
    in_all: false for a factor that everything on leaves at its baseline: it is switched on alone,
    and on top of everything on.
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
                "is missing its level; give one, or leave the key out for the engine's own baseline"
            )
        return level_name(given)


class Cell(Strict):
    """One more configuration beside those that the design makes: levels of factors, or another
    engine as a reference.

    config: engine settings that differ from the study's.
    """

    engine: str = "nanovllm"
    role: Literal["treatment", "all", "reference"]
    levels: dict[str, Level] = {}
    config: dict[str, Any] = {}

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
                f"{engine!r} is no engine; allowed: {', '.join(ENGINES)}, or the dotted path of a module with an Adapter"
            )
        return engine


class Comparison(Strict):
    """A cell of the study's engine against cells of others, and how alike they must be
    (experiments/launch/fairness.py).

    rule: `best` shares the checkpoint, dtype, workload and KV bytes; `like-for-like` the limits and
    the switches as well.
    """

    ours: Name
    theirs: list[Name] = Field(min_length=1)
    rule: Literal["best", "like-for-like"] = "best"


class EngineSettings(Strict):
    """What every cell shares. `None` is taken from the profile."""

    max_num_seqs: int = Field(default=64, ge=1, lt=2**31)
    max_num_batched_tokens: int = Field(default=1024, ge=1, lt=2**31)
    max_model_len: int = Field(default=1024, ge=1, lt=2**31)
    block_size: int = Field(default=16, ge=1, lt=2**31)
    kv_cache_memory_bytes: int | None = Field(default=None, ge=1, lt=2**63)


class ModelChoice(Strict):
    """A preset of nanovllm.models.checkpoint, or a folder; and the dtype it runs in."""

    preset: str | None = None
    path: str | None = None
    dtype: Dtype

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.preset is None) == (self.path is None):
            raise ValueError("give either `preset` or `path`")
        return self


class Study(Strict):
    """A question, the factors that answer it, and the work on which it is asked.

    fixed: levels that every cell of the engine under study has, of optimizations that are no
    factors here; else their baselines.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    title: str = Field(default_factory=lambda data: data["name"].replace("-", " "))
    question: str = "How much faster does each level make the engine?"
    engine: str = "nanovllm"
    model: ModelChoice | None = None
    metric: Literal[METRICS] = METRICS[0]  # type: ignore[valid-type]
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
    gate: dict[str, Any] = {}
    _source: str = PrivateAttr(default="")

    @property
    def source(self) -> str:
        """How messages call this study: its file where it was read from one."""
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
                    f"fixed.{name}: no optimization that this study leaves alone; allowed: {', '.join(free)}"
                )
            if level not in FACTORS[name]:
                raise ValueError(
                    f"fixed.{name}: {level!r} is not a level; allowed: {_listed(FACTORS[name])}"
                )
        for name, factor in self.factors.items():
            if missing := [w for w in factor.workloads if w not in self.workloads]:
                raise ValueError(
                    f"factors.{name}.workloads: {missing[0]!r} is no workload of this study; "
                    f"allowed: {', '.join(self.workloads)}"
                )
        if self.design.kind in designs.FACTORIALS and (alone := sorted(self.apart())):
            raise ValueError(
                f"factors.{alone[0]}.in_all: false has no meaning in design.kind {self.design.kind}, which combines "
                "all factors; allowed: add_one_in, leave_one_out, both"
            )
        if self.design.kind == "listed" and not self.cells:
            raise ValueError(
                "design.kind: listed makes no cells of its own, and the study has no `cells`: nothing to compare"
            )
        made = {"baseline", "aa", *self._made_by_design()}
        for name, cell in self.cells.items():
            if name in made:
                raise ValueError(
                    f"cells.{name}: the design makes a cell of this name; choose another"
                )
            if (cell.role == "reference") == (cell.engine == self.engine):
                raise ValueError(
                    f"cells.{name}: role {cell.role!r} and engine {cell.engine!r} do not fit; another engine is a "
                    f"reference, and a reference is another engine than the study's, {self.engine}"
                )
            for varied, level in cell.levels.items():
                where = f"cells.{name}.levels"
                if varied not in self.factors:
                    raise ValueError(
                        f"{where}: {varied!r} is no factor of this study; allowed: {', '.join(self.factors)}"
                    )
                if level not in FACTORS[varied]:
                    raise ValueError(
                        f"{where}.{varied}: {level!r} is not a level; allowed: {_listed(FACTORS[varied])}"
                    )
            if cell.role != "reference" and not cell.levels:
                raise ValueError(f"cells.{name}: a cell of role {cell.role} needs `levels`")
        for name, comparison in self.comparisons.items():
            for cell_name in (comparison.ours, *comparison.theirs):
                if cell_name not in made and cell_name not in self.cells:
                    known = ", ".join(["baseline", "aa", *self.cells])
                    raise ValueError(
                        f"comparisons.{name}: {cell_name!r} is no cell of this study; it has {known}"
                    )
        return self

    def baselines(self) -> dict[str, Level]:
        """The level at which each factor is off."""
        return {
            name: FACTORS[name][0] if factor.baseline is None else factor.baseline
            for name, factor in self.factors.items()
        }

    def apart(self) -> frozenset[str]:
        """The factors that are no part of everything on."""
        return frozenset(name for name, factor in self.factors.items() if not factor.in_all)

    def generators(self, levels: Mapping[str, Sequence[Level]]) -> dict[str, list[str]]:
        """The generators of a fractional factorial over these factors, stated or chosen; {} of any
        other design.

        Raises ValueError for what makes no fraction.
        """
        if self.design.kind != "fractional_factorial":
            return {}
        if wide := [name for name, found in levels.items() if len(found) != 1]:
            raise ValueError(
                f"factors.{wide[0]}.levels: a fractional factorial has one level beside the baseline, "
                f"not {len(levels[wide[0]])}; keep one, or use kind: full_factorial"
            )
        stated, least = self.design.generators, self.design.resolution
        if not stated:
            return designs.choose_generators(list(levels), least)
        free = [name for name in levels if name not in stated]
        for factor, parents in stated.items():
            where = f"design.generators.{factor}"
            if factor not in levels:
                raise ValueError(f"{where}: no factor of this study; allowed: {', '.join(levels)}")
            if (
                len(set(parents)) < 2
                or len(set(parents)) < len(parents)
                or not set(parents) <= set(free)
            ):
                raise ValueError(
                    f"{where}: {_listed(parents)}; allowed: two or more of the factors without a generator, each "
                    f"once: {_listed(free)}"
                )
        if (reached := designs.resolution(stated)) < least:
            raise ValueError(
                f"design.generators: their resolution is {reached}; design.resolution asks for {least} or more"
            )
        return {factor: list(parents) for factor, parents in stated.items()}

    def _made_by_design(self) -> Iterable[str]:
        levels = {name: factor.levels for name, factor in self.factors.items()}
        return designs.cells(
            self.design.kind, self.baselines(), levels, self.generators(levels), apart=self.apart()
        )


class Match(Strict):
    """How a machine is recognized: the name of its GPUs as the driver gives it, `*` standing for
    anything, and how many of them.
    """

    gpu_name: str
    num_gpus: int = Field(default=1, ge=1)


class Profile(Strict):
    """Hardware. Bandwidth and peaks are per device and bound what any engine can do; `measure`
    measures them here, once.

    A file describes a machine that is planned for and may be absent. Where the machine at hand is
    the one that `match` describes, what is measured here wins over what the file says. memory_bytes
    and cpu_cores: None is what this machine has.
    kv_cache_memory_bytes: of each device; `measure` takes what is free beside weights and
    activations, and no more than the work can fill. host_op_s: seconds in which the host launches
    one operation, import_s: in which Python imports torch; both only size the work of a study.
    preset and dtype: the model where a study names none.
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


def load_study(source: str | Path, overrides: Iterable[str] = ()) -> tuple[Study, dict[str, Any]]:
    """A study by path or by the name of a file in ablations/studies, and its overrides
    ("design.blocks=2") as a mapping.
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
            raise ValueError(f"{name}: {level!r} is not a level; allowed: {_listed(allowed)}")
    if baseline in factor.levels or len(set(factor.levels)) < len(factor.levels):
        raise ValueError(
            f"{name}: levels {_listed(factor.levels)} must differ from each other and from the baseline, {baseline}, "
            "which runs anyway"
        )
    return baseline


def _listed(levels: Iterable[Level]) -> str:
    return ", ".join(map(str, levels))
