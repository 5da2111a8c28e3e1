"""python -m experiments.run.ui: MLflow's own interface, after a line for each study with the address
of its table.
"""

from __future__ import annotations

import os
import sys
from urllib.parse import urlsplit

from experiments.host.environment import WORKPLACE
from experiments.run import tracking


def lines() -> list[str]:
    """What is printed before the server starts."""
    try:
        found, comparison = tracking.links(), tracking.comparison()
    except tracking.TrackingError as error:
        return [f"MLflow cannot be read: {error}"]
    if not found:
        return ["MLflow has no study yet: `make ablate` records one"]
    width = max(map(len, found))
    lines = [
        "Configurations of each study, the fastest first:",
        *(f"  {study:{width}}  {table}" for study, table in found.items()),
    ]
    return [*lines, "All of them as charts:", f"  {comparison}"] if comparison else lines


def main() -> None:
    """Prints the addresses and becomes `mlflow ui`."""
    print("\n".join(lines()), flush=True)
    address = urlsplit(tracking.ADDRESS)
    os.chdir(WORKPLACE)  # where the database and the artifacts are
    command = ["mlflow", "ui", "--host", str(address.hostname), "--port", str(address.port)]
    os.execv(sys.executable, [sys.executable, "-m", *command])


if __name__ == "__main__":
    main()
