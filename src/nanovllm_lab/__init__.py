"""The command `nanovllm`, and the home of the laboratory in an installed package.

A wheel holds `experiments/`, `reports/` and the studies in this folder, so that no general names
such as `reports` end up in site-packages. In a clone they are at the root of the repository. Both
are found here, and put first on the path of modules: docs/adr/0013-installed-laboratory.md.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
HOME = HERE if (HERE / "experiments").is_dir() else HERE.parents[1]
"""The folder that holds `experiments/` and `reports/`."""


def main() -> None:
    """Runs the command line of the laboratory."""
    if str(HOME) not in sys.path:
        sys.path.insert(0, str(HOME))
    from experiments.__main__ import main as run

    run()
