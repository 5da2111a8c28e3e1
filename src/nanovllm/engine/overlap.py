"""overlap=True: the step loop that gives the device its next step before it waits for the last
one. Loaded only when on.

    host     plan n+1 | submit n+1 | collect n | commit n | plan n+2 | ...
    device   ...... step n .......... | ..... step n+1 ......

Step n+1 reads the tokens of step n on the device; the host learns of them one step late (commit lag
1). So a request that ends with a stop token has one step too many in flight, whose token is
discarded at commit.
"""

from collections import deque
from typing import Any

from nanovllm.engine.scheduler import Scheduler, StepPlan
from nanovllm.engine.sequence import Sequence


class OverlappedStepLoop:
    """The same interface as llm_engine.StepLoop, with one step in flight."""

    def __init__(self, scheduler: Scheduler, runner: Any) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.in_flight: deque[tuple[StepPlan, Any]] = deque()

    def step(self) -> tuple[StepPlan | None, list[Sequence]]:
        """Submits the next step, then commits the one before it. Returns the submitted plan and the
        sequences that got a token.
        """
        plan = self.scheduler.schedule()
        if plan is not None:
            self.scheduler.stats.overlapped_steps += bool(self.in_flight)
            self.in_flight.append((plan, self.runner.submit(plan)))
        if not self.in_flight or (plan is not None and len(self.in_flight) == 1):
            return plan, []
        oldest, handle = self.in_flight.popleft()
        return plan, self.scheduler.commit(oldest, *self.runner.collect(handle))
