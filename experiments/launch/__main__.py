"""`python -m experiments.launch`: carries out the launches of a plan (runner.py)."""

import sys

from experiments.launch.runner import main

if __name__ == "__main__":
    sys.exit(main())
