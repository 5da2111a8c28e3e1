"""The former name of `python -m experiments.gate`, which published pages still refer to."""

import sys

from experiments.gate.judge import main

if __name__ == "__main__":
    sys.exit(main())
