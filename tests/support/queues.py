"""Queues with known answers: simulated waiting times, and the exact distributions they must follow.

M/M/1 (Poisson arrivals, exponential service, one server): the time in the system is exponential with
rate mu - lambda. M/D/c (constant service D, c servers): G. J. Franx, "A simple solution for the M/D/c
waiting time distribution", Operations Research Letters 29, 2001.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

Floats = NDArray[np.float64]


def simulate_mm1(rng: np.random.Generator, series: int, n: int, load: float) -> tuple[Floats, ...]:
    """(arrival times, starts of service, departures), each [series, n]; mean service time 1, empty at
    the start. By Lindley's recursion.
    """
    arrivals = np.cumsum(rng.exponential(1 / load, (series, n)), axis=1)
    service = rng.exponential(1, (series, n))
    return _one_after_the_other(arrivals, service, 1)


def simulate_mdc(
    rng: np.random.Generator, series: int, n: int, load: float, servers: int
) -> tuple[Floats, ...]:
    """The same of M/D/c with service time 1 and `load` per server, by Kiefer and Wolfowitz."""
    arrivals = np.cumsum(rng.exponential(1 / (load * servers), (series, n)), axis=1)
    return _one_after_the_other(arrivals, np.ones((series, n)), servers)


def _one_after_the_other(arrivals: Floats, service: Floats, servers: int) -> tuple[Floats, ...]:
    free = np.zeros((len(arrivals), servers))
    starts = np.empty_like(arrivals)
    rows = np.arange(len(arrivals))
    for k in range(arrivals.shape[1]):
        first = free.argmin(axis=1)
        starts[:, k] = np.maximum(arrivals[:, k], free[rows, first])
        free[rows, first] = starts[:, k] + service[:, k]
    return arrivals, starts, starts + service


def mm1_time_in_system(load: float, share: float) -> float:
    """A quantile of the time in the system of M/M/1 with mean service time 1."""
    return -math.log(1 - share) / (1 - load)


def mdc_wait(load: float, servers: int, share: float) -> float:
    """A quantile of the time that requests wait in M/D/c with service time 1; `load` per server. 0
    where more than this share need not wait.
    """
    queue = np.cumsum(_states(load, servers))[servers:]  # P(at most m wait), m = 0, 1, ...
    rate = load * servers

    def at_most(wait: float) -> float:
        k = math.floor(wait) + 1  # (k - 1) D <= wait < k D
        left = rate * (k - wait)
        terms = np.arange(k * servers)
        logs = terms * math.log(left) - left - np.cumsum(np.log(np.maximum(terms, 1)))
        return float((np.exp(logs) * queue[k * servers - 1 - terms]).sum())

    return (
        0.0
        if at_most(0.0) >= share
        else float(optimize.brentq(lambda x: at_most(x) - share, 0, 40))
    )


def _states(load: float, servers: int, most: int = 400) -> Floats:
    """P(n requests are in the system), n = 0 to most: seen again one service time later, those in
    service have left and Poisson many have come.
    """
    come = stats.poisson.pmf(np.arange(most + 1), load * servers)
    step = np.zeros((most + 1, most + 1))
    for before in range(most + 1):
        left = max(0, before - servers)
        step[before, left:] = come[: most + 1 - left]
    step /= step.sum(axis=1, keepdims=True)
    states = np.full(most + 1, 1 / (most + 1))
    for _ in range(2_000):
        following = states @ step
        if np.abs(following - states).max() < 1e-15:
            break
        states = following
    return following
