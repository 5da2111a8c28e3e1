"""Measures the price of every lossy configuration of a plan.

    python -m experiments.price --plan plan.json --out DIR [--resume] [--model DIR]

starts each lossy configuration of the plan once, lets it read the held prompts, compares its
distribution over the vocabulary with the reference's at every position, and appends a price record
for each to DIR/records.jsonl. Exit status 0: all were measured; 1: some could not be; 2: the folder
or the plan cannot be used.

Records hold sums for each prompt, no verdicts: reports judge them by the margins of the plan
(verdicts.py). Like the gate it runs as a process of its own, and needs torch and transformers.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Container, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from experiments import workloads
from experiments.engines import load_adapter
from experiments.gate.chance.significance import quantiles
from experiments.gate.judge import find_model
from experiments.gate.rescoring import REFERENCE_DTYPE
from experiments.gate.verdicts import GateError
from experiments.host.provenance import code_digest
from experiments.price.distances import Distances, distances
from experiments.price.reference import Reference
from experiments.price.rules import METRICS
from experiments.records import store
from experiments.records.types import Config, Plan, PlannedPrice, PriceFigures, PriceRecord

STEP_TOKENS = 16
"""Tokens of a prompt that an engine reads in a step. All that came before is then read from the KV
cache, and matrices have the few rows that they have when answers are generated. A prompt that is
read in one step could do without the cache, and hide what a rounded cache costs."""
TABLE_BYTES = 2**26
"""Limit on one float64 table of logits."""

ReadPrompt = Callable[[list[int], Callable[[Tensor], None]], None]
"""An engine's `prompt_logits`."""


class PriceError(Exception):
    """A price that cannot be measured; the message says what to do."""


def compare(
    reference: Reference, read_prompt: ReadPrompt, token_ids: list[int]
) -> tuple[Distances, Distances]:
    """The distances of an engine from the reference at every position of a prompt but the last, and
    those of the reference with injected rounding. At no time is more than a part of the table
    [positions, vocab] in memory.

    Raises PriceError where the engine hands over logits of another number of positions.
    """
    reading = reference.read(token_ids)
    engine: list[Distances] = []
    floor: list[Distances] = []
    done = 0

    def take(logits: Tensor) -> None:
        nonlocal done
        step = max(1, TABLE_BYTES // (8 * logits.shape[-1]))
        for part in logits.split(step):
            if done + len(part) > len(reading):
                raise PriceError(
                    f"the engine gave logits of more than {len(reading)} positions of a prompt of {len(token_ids)} tokens"
                )
            exact, noisy = reading.logits(done, done + len(part))
            targets = reading.targets[done : done + len(part)]
            engine.append(distances(exact, part, targets))
            floor.append(distances(exact, noisy, targets))
            done += len(part)

    read_prompt(token_ids, take)
    if done != len(reading):
        raise PriceError(
            f"the engine gave logits of {done} of the {len(reading)} positions of a prompt: is its prefix cache read?"
        )
    return Distances.cat(engine), Distances.cat(floor)


def price_of(
    reference: Reference,
    read_prompt: ReadPrompt,
    prompts: Iterable[list[int]],
    progress: Callable[[int], None] | None = None,
) -> PriceFigures:
    """What a price is computed from: sums for each prompt, and quantiles of the KL divergence over all
    tokens. progress: called with the number of prompts that are done.
    """
    found = []
    for token_ids in prompts:
        found.append(compare(reference, read_prompt, token_ids))
        if progress is not None:
            progress(len(found))
    sides = [[pair[side] for pair in found] for side in (0, 1)]
    engine, floor = (
        {metric: [part.totals()[metric] for part in side] for metric in METRICS} for side in sides
    )
    engine_kl, floor_kl = (quantiles(torch.cat([part.kl for part in side])) for side in sides)
    return {
        "prompts": {"tokens": [len(part) for part in sides[0]], "engine": engine, "floor": floor},
        "engine_kl": engine_kl,
        "floor_kl": floor_kl,
        "step_tokens": STEP_TOKENS,
    }


def settings_of(config: Config, allowed: Container[str]) -> Config:
    """The settings in which a cell is priced: its own, but it reads one prompt at a time, in steps of
    STEP_TOKENS, as far as the engine has these settings.
    """
    change = {"max_num_seqs": 1, "max_num_batched_tokens": STEP_TOKENS, "seed": 0}
    return {**config, **{name: value for name, value in change.items() if name in allowed}}


class Pricing:
    """The prices of one folder of records. The reference is loaded when first needed."""

    def __init__(self, plan: Plan, folder: store.Folder, model: Path | None = None) -> None:
        """model: the folder of the plan's checkpoint, if it is elsewhere on this machine. Raises
        PriceError.
        """
        if "price" not in plan:
            raise PriceError(
                f"study {plan['study']['name']} has no lossy configuration: nothing has a price"
            )
        self.plan, self.folder = plan, folder
        self.rules: PlannedPrice = plan["price"]
        try:
            self.model_dir = find_model(plan["model"], model)
            drawn = workloads.rebuild("price.prompts", self.rules["prompts"])
        except (GateError, ValueError) as error:
            raise PriceError(str(error)) from error
        self.prompts = [r["prompt_token_ids"] for wave in drawn["waves"] for r in wave]
        self._reference: Reference | None = None

    def pending(self, resume: bool) -> list[str]:
        """The cells to measure; without `resume`, all lossy ones."""
        measured = {
            record["cell"]
            for record in self.folder.records
            if record["kind"] == "price"
            and record["plan_hash"] == self.plan["plan_hash"]
            and record["status"] == "ok"
        }
        return [cell for cell in self.rules["cells"] if not resume or cell not in measured]

    def measure(self, cell: str) -> PriceRecord:
        """The price record of a cell, with the reason where it could not be measured."""
        entry, dtype, begin = (
            self.plan["cells"][cell],
            self.plan["model"]["dtype"],
            time.perf_counter(),
        )
        make = load_adapter(entry["engine"])
        requested = settings_of(entry["config"], make.allowed)
        resolved: Config = {}
        figures, reason = None, None
        try:
            adapter: Any = make(str(self.model_dir), requested)
            if not hasattr(adapter, "prompt_logits"):
                raise PriceError(
                    f"the adapter of {entry['engine']} cannot tell the engine's distributions: it has no method "
                    "`prompt_logits` (experiments/engines)"
                )
            resolved = adapter.load()
            try:
                figures = price_of(
                    self.reference(), adapter.prompt_logits, self.prompts, self._say_progress(cell)
                )
            finally:
                adapter.close()
                del adapter
                gc.collect()
        except (PriceError, ValueError, NotImplementedError, RuntimeError, ImportError) as error:
            reason = str(error) or type(error).__name__
        return {
            "kind": "price",
            "schema": store.SCHEMA,
            "study": self.plan["study"]["name"],
            "plan_hash": self.plan["plan_hash"],
            "cell": cell,
            "levels": self.rules["cells"][cell],
            "status": "error" if figures is None else "ok",
            "reason": reason,
            "fingerprint": self.rules["prompts"]["fingerprint"],
            "dtype": dtype,
            "reference_dtype": str(REFERENCE_DTYPE[dtype]).removeprefix("torch."),
            "requested": requested,
            "resolved": resolved,
            "figures": figures,
            "code_digest": code_digest(),
            "duration_s": time.perf_counter() - begin,
        }

    def reference(self) -> Reference:
        if self._reference is None:
            say("loading the unquantized reference")
            self._reference = Reference(self.model_dir, self.plan["model"]["dtype"])
        return self._reference

    def _say_progress(self, cell: str) -> Callable[[int], None]:
        last = time.monotonic()

        def progress(done: int) -> None:
            nonlocal last
            if time.monotonic() - last >= 5 and done < len(self.prompts):
                last = time.monotonic()
                say(f"{cell}: {done} of {len(self.prompts)} prompts")

        return progress


def say(message: str) -> None:
    print(f"price: {message}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.price", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--plan", type=Path, required=True, help="plan.json of the folder")
    parser.add_argument("--out", type=Path, required=True, help="folder with records.jsonl")
    parser.add_argument("--resume", action="store_true", help="skip cells that have a price")
    parser.add_argument(
        "--model",
        type=Path,
        help="folder of the plan's checkpoint, if it is elsewhere on this machine",
    )
    options = parser.parse_args(arguments)
    disable_progress_bar()  # transformers' own, while it loads weights
    try:
        plan = store.read_plan(options.plan)
        with store.Folder(options.out) as folder:
            return run(Pricing(plan, folder, options.model), options.resume)
    except (store.RecordError, PriceError) as error:
        say(str(error))
        return 2


def run(pricing: Pricing, resume: bool) -> int:
    failed = 0
    for cell in pricing.pending(resume):
        record = pricing.measure(cell)
        pricing.folder.append(record)
        failed += record["status"] != "ok"
        say(f"{cell}: {described(record)}")
    return 1 if failed else 0


def described(record: PriceRecord) -> str:
    """A price record in a line."""
    figures = record["figures"]
    if figures is None:
        return f"not measured: {record['reason']}"
    prompts = figures["prompts"]
    tokens = sum(prompts["tokens"])
    engine, floor = (
        {metric: sum(prompts[side][metric]) / tokens for metric in METRICS}  # type: ignore[literal-required]
        for side in ("engine", "floor")
    )
    return (
        f"{engine['kl']:.3g} nats per token ({floor['kl']:.3g} of them rounding to {record['dtype']}), top choice kept in "
        f"{1 - engine['top_choice']:.1%}, {tokens:,} tokens of {len(prompts['tokens'])} prompts"
    )
