"""The gate's rules, which turn scores (`experiments.gate.rescoring`) into pass or fail. They are
motivated in docs/methodology.md.

Noise is calibrated on the sample that is judged: `error` is the error of HF itself in the engine's
dtype. With bound = factor * (largest error) + floor, and typical bound = factor * (99.9 % quantile
of the error) + floor:

1. the engine did the work that was asked for (`experiments.gate.same_work`);
2. every token's margin is within the bound;
3. the number of tokens beyond the typical bound is compatible with a rate of 0.1 %;
4. the engine disagrees with the reference not significantly more than `factor` times as often as HF
does;
5. tokens of another random generator follow the reference's distribution: all together (z-test),
within every part of a request (Ville's inequality), request by request (dispersion), at the ends of
all answers, and in how many lie outside of what is kept (Markov's inequality);
6. log-probabilities, where they were returned, are those of the reference.

The numbers are those of docs/methodology.md.

Every statistical test is made at level `alpha`. Needs only torch and the standard library.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.gate.chance.event_counts import evidence_of_count
from experiments.gate.chance.significance import (
    binomial_limit,
    dispersion,
    evidence_of_ends,
    largest_rise,
    normal_limit,
    quantile,
    quantiles,
    self_normalized_excess,
)
from experiments.gate.rescoring import DTYPE, REFERENCE_DTYPE
from experiments.gate.scoring import Scores
from experiments.records.types import (
    Calibration,
    Distribution,
    GateStatus,
    JsonObject,
    Offender,
    PositionErrors,
    Verdict,
)


@dataclass(frozen=True)
class GateParams:
    """The gate's settings (`gate` in a plan).

    factor: the engine's error may be this many times HF's. floor_ulps: rounding of the logits that
    is always allowed, in ulps of the largest logit in the engine's dtype, for samples too small to
    show it. quantile: that of the typical bound. alpha: level of each statistical test.
    batch_tokens, logits_bytes: see Rescorer. control_tokens: minimum number of output tokens that
    a negative control rescores.
    """

    factor: float = 2.0
    floor_ulps: float = 1.0
    quantile: float = 0.999
    alpha: float = 1e-6
    batch_tokens: int = 4096
    logits_bytes: int = 2**26
    control_tokens: int = 1024

    def __post_init__(self) -> None:
        for name, (ok, allowed) in {
            "factor": (self.factor >= 1, "1 or more"),
            "floor_ulps": (self.floor_ulps >= 0, "0 or more"),
            "quantile": (0 < self.quantile < 1, "in (0, 1)"),
            "alpha": (0 < self.alpha < 1, "in (0, 1)"),
            "batch_tokens": (self.batch_tokens >= 1, "1 or more"),
            "logits_bytes": (self.logits_bytes >= 1, "1 or more"),
            "control_tokens": (self.control_tokens >= 1, "1 or more"),
        }.items():
            if not ok:
                raise ValueError(
                    f"invalid gate parameter {name}={getattr(self, name)!r}; it must be {allowed}"
                )

    @classmethod
    def from_plan(cls, gate: JsonObject) -> GateParams:
        allowed = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(gate) - set(allowed)):
            raise ValueError(
                f"unknown gate parameter {unknown[0]!r} in the plan; allowed: {', '.join(allowed)}"
            )
        return cls(**gate)


@dataclass(frozen=True)
class GateResult:
    """The verdict on one set of outputs. Margins, errors and bounds are in logits; the fields are
    those of a gate record.

    mismatches: tokens that the reference would not have chosen; within_bound: those of them that
    noise explains.
    """

    status: GateStatus
    reason: str | None
    tokens_checked: int
    mismatches: int
    within_bound: int
    max_margin: float
    bound: float
    calibration: Calibration
    first_offender: Offender | None
    duration_s: float = 0.0

    def as_verdict(self) -> Verdict:
        return {
            "status": self.status,
            "reason": self.reason,
            "tokens_checked": self.tokens_checked,
            "mismatches": self.mismatches,
            "within_bound": self.within_bound,
            "max_margin": self.max_margin,
            "bound": self.bound,
            "calibration": self.calibration,
            "first_offender": self.first_offender,
            "duration_s": self.duration_s,
        }

    @property
    def passed(self) -> bool:
        return self.status == "pass"


@dataclass(frozen=True)
class LogprobResult:
    """The result of comparing log-probabilities at every position. Quantiles are {"q50", "q99",
    "q999", "max"}, in nats.
    """

    status: GateStatus
    reason: str | None
    positions: int
    engine_error: dict[str, float]
    hf_error: dict[str, float]
    bound: dict[str, float]


def judge(
    scores: Sequence[Scores], dtype: str, params: GateParams, budgets: Sequence[int] | None = None
) -> GateResult:
    """Applies the rules. scores: one entry per request. dtype: the engine's. budgets: max_tokens of
    each request; without them the ends of answers are not looked at together. Raises ValueError if
    there is no token to judge.
    """
    tokens = _concatenated(scores)
    margin, unknown_noise = tokens.margin, tokens.unknown_noise
    differs = ~tokens.agrees
    floor, bound, typical = _bounds(tokens.error, tokens, dtype, params)

    beyond = margin > bound
    above_typical = int((margin > typical).sum())
    allowed_above = binomial_limit(len(tokens), 1 - params.quantile, params.alpha)
    hf_differs = ~tokens.hf_agrees & ~unknown_noise
    excess_z = self_normalized_excess(
        [
            int((~s.agrees & ~s.unknown_noise).sum())
            - params.factor * int((~s.hf_agrees & ~s.unknown_noise).sum())
            for s in scores
        ]
    )
    z_limit = normal_limit(params.alpha)

    reasons = []
    if beyond.any():
        reasons.append(
            f"{int(beyond.sum())} of {len(tokens)} tokens exceed the noise bound of {bound:.3g} logits (largest margin "
            f"{float(margin.max()):.3g})"
        )
    if above_typical > allowed_above:
        reasons.append(
            f"{above_typical} tokens exceed the typical bound of {typical:.3g} logits; {allowed_above} are allowed"
        )
    if excess_z > z_limit:
        reasons.append(
            f"{int((differs & ~unknown_noise).sum())} tokens differ from the reference's choice, more than {params.factor:g} "
            f"times the {int(hf_differs.sum())} of HF in {dtype} (z = {excess_z:.1f}, limit {z_limit:.1f})"
        )
    distribution = None
    if unknown_noise.any():
        distribution, distribution_reasons = judge_distribution(scores, params, budgets)
        reasons += distribution_reasons

    return GateResult(
        status="fail" if reasons else "pass",
        reason="; ".join(reasons) or None,
        tokens_checked=len(tokens),
        mismatches=int(differs.sum()),
        within_bound=int((differs & ~beyond).sum()),
        max_margin=float(margin.max()),
        bound=bound,
        calibration={
            "reference_dtype": str(REFERENCE_DTYPE[dtype]).removeprefix("torch."),
            "factor": params.factor,
            "alpha": params.alpha,
            "floor": floor,
            "hf_error": quantiles(tokens.error),
            "hf_mismatches": int(hf_differs.sum()),
            "typical_bound": typical,
            "above_typical_bound": above_typical,
            "allowed_above_typical_bound": allowed_above,
            "excess_mismatches_z": excess_z,
            "z_limit": z_limit,
            "margin": quantiles(margin),
            "by_position": by_position(scores),
            "hf_logprob_error": quantiles((tokens.hf_logprob - tokens.logprob).abs()),
            "repeated_tokens": _repeats(scores),
            "distribution": distribution,
        },
        first_offender=_offender(scores, bound, int(margin.argmax())) if reasons else None,
    )


def by_position(scores: Sequence[Scores]) -> list[PositionErrors]:
    """Errors by output position: for ranges [first, last] of doubling length, the number of tokens,
    of mismatches, and quantiles of the margin and of HF's error. Shows engines that go wrong late.
    """
    position = torch.cat([torch.arange(len(s)) for s in scores])
    tokens = Scores.cat(scores)
    result: list[PositionErrors] = []
    first, end = 0, int(position.max()) + 1
    while first < end:
        last = min(end, 2 * first + 16) - 1
        here = tokens[((position >= first) & (position <= last)).nonzero().flatten()]
        result.append(
            {
                "first": first,
                "last": last,
                "tokens": len(here),
                "mismatches": int((~here.agrees).sum()),
                "hf_mismatches": int((~here.hf_agrees & ~here.unknown_noise).sum()),
                "margin": quantiles(here.margin),
                "hf_error": quantiles(here.error),
            }
        )
        first = last + 1
    return result


def judge_distribution(
    scores: Sequence[Scores], params: GateParams, budgets: Sequence[int] | None = None
) -> tuple[Distribution, list[str]]:
    """Tests whether tokens of an unknown random generator follow the reference's distribution.
    Given the tokens before it, log p(token) + entropy has mean 0.

    - z = sum(log p + entropy) / sqrt(sum variance(log p)) over all tokens (martingale central limit
      theorem), two-sided. The limit is widened by `factor` times the shift of that sum that HF's
      own error in the engine's dtype causes (known exactly, not sampled);
    - for each request, from any of its tokens to any later one, prod p(token)^(-1/2) / sum_i
      p_i^(1/2) exceeds 1 / level with a probability of at most `level`: it is a martingale of mean
      1, and so is the mean of those that begin at each token, hence Ville's inequality, exact for
      any length; level = alpha / tokens. An output that goes wrong late is detected like one that
      is wrong from the start;
    - the squares of the requests' own sums are compared with their variances
      (`significance.dispersion`): requests that exchanged their parameters;
    - the same factors at the ends of all answers together (`significance.evidence_of_ends`): one or
      two wrong tokens in many of them.

    Tokens outside what min-p, top-k and top-p keep are left out of these. They are judged by their
    margin, and by their number: at most as many as HF's error at each position could bring in
    (`chance.event_counts.evidence_of_count`).
    """
    tokens = _concatenated(scores)
    used = tokens.unknown_noise & tokens.agrees
    total = float((tokens.log_p + tokens.entropy)[used].sum())
    deviation = math.sqrt(float(tokens.variance[used].sum()))
    # no variance: one token was possible everywhere
    z = total / deviation if deviation > 0 else 0.0
    drift_z = float(tokens.drift[used].sum()) / deviation if deviation > 0 else 0.0
    limit = normal_limit(params.alpha / 2) + params.factor * abs(drift_z)

    steps = [
        torch.where(s.unknown_noise & s.agrees, -s.log_p / 2 - s.root_sum, 0.0) for s in scores
    ]
    evidence = [largest_rise(own) for own in steps]
    worst, evidence_limit = (
        int(torch.stack(evidence).argmax()),
        math.log(len(tokens) / params.alpha),
    )
    own = [s[(s.unknown_noise & s.agrees).nonzero().flatten()] for s in scores]
    dispersion_z = dispersion(
        [float((s.log_p + s.entropy).sum()) for s in own],
        [float(s.variance.sum()) for s in own],
        [float(s.drift.sum()) for s in own],
        params.factor,
    )
    dispersion_limit = normal_limit(params.alpha)
    outside, explained = (
        int((tokens.unknown_noise & ~tokens.agrees).sum()),
        float(tokens.near.sum()),
    )
    outside_evidence, outside_limit = evidence_of_count(outside, explained), -math.log(params.alpha)
    reasons = []
    if abs(z) > limit:
        reasons.append(
            f"the sampled tokens do not follow the reference's distribution: z = {z:.1f}, limit {limit:.1f} at alpha = "
            f"{params.alpha:g} (its tokens are {'too unlikely' if z < 0 else 'too likely'}; is the temperature wrong?)"
        )
    if float(evidence[worst]) > evidence_limit:
        reasons.append(
            f"request {worst}: its tokens are too unlikely under the reference (log evidence "
            f"{float(evidence[worst]):.1f}, limit {evidence_limit:.1f})"
        )
    if dispersion_z > dispersion_limit:
        reasons.append(
            f"some requests are too likely and others too unlikely under the reference (dispersion: z = {dispersion_z:.1f}, "
            f"limit {dispersion_limit:.1f}; were sampling parameters exchanged?)"
        )
    if outside_evidence > outside_limit:
        reasons.append(
            f"{outside} tokens lie outside of what min-p, top-k and top-p keep, where HF's error explains {explained:.1f} (log "
            f"evidence {outside_evidence:.1f}, limit {outside_limit:.1f}; is one of them wrong?)"
        )
    result: Distribution = {
        "z": z,
        "z_limit": limit,
        "hf_drift_z": drift_z,
        "tokens": int(used.sum()),
        "mean_log_p_plus_entropy": total / max(1, int(used.sum())),
        "largest_log_evidence": float(evidence[worst]),
        "log_evidence_limit": evidence_limit,
        "dispersion_z": dispersion_z,
        "dispersion_limit": dispersion_limit,
        "outside": outside,
        "outside_explained": explained,
        "outside_log_evidence": outside_evidence,
        "outside_log_evidence_limit": outside_limit,
    }
    if budgets is not None:
        ends, ends_limit = evidence_of_ends(steps, budgets), -math.log(params.alpha)
        result["end_log_evidence"], result["end_log_evidence_limit"] = ends, ends_limit
        if ends > ends_limit:
            reasons.append(
                f"the last tokens of many answers are too unlikely under the reference (log evidence {ends:.1f}, "
                f"limit {ends_limit:.1f})"
            )
    return result, reasons


def compare_logprobs(
    scores: Sequence[Scores], logprobs: Sequence[Sequence[float]], dtype: str, params: GateParams
) -> LogprobResult:
    """Tests whether the engine's log-probabilities are as close to the reference's as HF's.

    logprobs: the engine's log softmax(logits)[token] of the tokens of `scores`, one list per
    request, from an untimed pass. Median, 99 % quantile, 99.9 % quantile and maximum of |engine -
    reference| must each be within factor * HF's + floor.
    """
    lengths = [len(values) for values in logprobs]
    if lengths != [len(s) for s in scores]:
        raise ValueError(
            f"got log-probabilities of {lengths} tokens for outputs of {[len(s) for s in scores]} tokens"
        )
    tokens = _concatenated(scores)
    ours = torch.tensor([value for values in logprobs for value in values], dtype=torch.float64)
    error = (ours - tokens.logprob).abs()
    hf_error = (tokens.hf_logprob - tokens.logprob).abs()
    floor = params.floor_ulps * torch.finfo(DTYPE[dtype]).eps * float(tokens.scale.max())
    engine, hf = quantiles(error), quantiles(hf_error)
    bound = {name: params.factor * value + floor for name, value in hf.items()}
    broken = [name for name in engine if not engine[name] <= bound[name]]  # NaN is broken
    reason = None
    if broken:
        worst = broken[-1]
        reason = (
            f"log-probabilities differ from the reference by {engine[worst]:.3g} nats ({worst}); the bound is "
            f"{bound[worst]:.3g}, HF in {dtype} differs by {hf[worst]:.3g}"
        )
    return LogprobResult("fail" if broken else "pass", reason, len(tokens), engine, hf, bound)


def _bounds(
    error: Tensor, tokens: Scores, dtype: str, params: GateParams
) -> tuple[float, float, float]:
    floor = params.floor_ulps * torch.finfo(DTYPE[dtype]).eps * float(tokens.scale.max())
    typical = quantile(error.sort().values, params.quantile)
    return floor, params.factor * float(error.max()) + floor, params.factor * typical + floor


def _repeats(scores: Sequence[Scores]) -> float:
    """The share of output tokens equal to the one before. Repetitive outputs can hide errors."""
    pairs = sum(max(0, len(s) - 1) for s in scores)
    return sum(int((s.tokens[1:] == s.tokens[:-1]).sum()) for s in scores) / max(1, pairs)


def _concatenated(scores: Sequence[Scores]) -> Scores:
    if not any(len(s) for s in scores):
        raise ValueError("there is no output token to judge")
    return Scores.cat(scores)


def _offender(scores: Sequence[Scores], bound: float, worst: int) -> Offender:
    """The first token beyond the bound, by request and position, else the one with the largest
    margin.
    """
    offset = 0
    found = None
    for request, s in enumerate(scores):
        beyond = (s.margin > bound).nonzero().flatten()
        if len(beyond):
            found = request, int(beyond[0])
            break
        if found is None and offset <= worst < offset + len(s):
            found = request, worst - offset
        offset += len(s)
    assert found is not None
    request, position = found
    s = scores[request]

    def top(ids: Tensor, values: Tensor) -> list[list[float | int | None]]:
        return [
            [int(i), float(v) if math.isfinite(v) else None]
            for i, v in zip(ids[position], values[position], strict=True)
        ]

    return {
        "request": request,
        "position": position,
        "token": int(s.tokens[position]),
        "margin": float(s.margin[position]),
        "reference_choice": int(s.best[position, 0]),
        "reference_top5": top(s.best, s.best_scores),
        "hf_top5": top(s.hf_best, s.hf_best_scores),
    }
