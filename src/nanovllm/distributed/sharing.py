"""Which replica serves which request. No torch."""

from collections.abc import Sequence


def expected_work(prompt_tokens: int, max_tokens: int) -> float:
    """Expected work of a request, in tokens: each output token costs one, plus one per 1,000 tokens
    of context that it reads; a prompt token costs a twentieth. Only ratios matter; a request that
    stops early is overestimated.
    """
    return prompt_tokens / 20 + max_tokens * (1 + (prompt_tokens + max_tokens / 2) / 1000)


def share_out(work: Sequence[float], parts: int) -> list[list[int]]:
    """Indices of each part, ascending: the largest item first, always to the part with the least
    work (Graham's LPT rule).
    """
    loads, shares = [0.0] * parts, [[] for _ in range(parts)]  # type: ignore[var-annotated]
    for index in sorted(range(len(work)), key=lambda i: -work[i]):
        least = loads.index(min(loads))
        loads[least] += work[index]
        shares[least].append(index)
    return [sorted(share) for share in shares]
