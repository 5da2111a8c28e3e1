"""`python -m experiments.price`: measures what lossy configurations cost (measure.py)."""

import sys

from experiments.price.measure import main

if __name__ == "__main__":
    sys.exit(main())
