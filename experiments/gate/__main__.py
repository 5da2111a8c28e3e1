"""`python -m experiments.gate`: judges the tokens of a folder of records (judge.py)."""

import sys

from experiments.gate.judge import main

if __name__ == "__main__":
    sys.exit(main())
