"""The former name of `python -m experiments.gate`: pages published with it tell their readers to type
it.
"""

import sys

from experiments.gate.judge import main

if __name__ == "__main__":
    sys.exit(main())
