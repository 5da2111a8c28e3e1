"""The laboratory. It is never installed: it measures the engine in src/ beside it, whatever
nanovllm the interpreter has.
"""

import sys
from pathlib import Path

_ENGINE = str(Path(__file__).resolve().parent.parent / "src")
if _ENGINE not in sys.path:
    sys.path.insert(0, _ENGINE)
