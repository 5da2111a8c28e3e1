"""Reports: pure statistics over records, and the pages rendered from them.

records.py reads the files, counting.py decides what counts, metrics.py takes figures from a record,
intervals.py does the statistics of one effect, contrasts.py those of a whole design, ceiling.py the
roofline bound, consistency.py the checks of a record against itself; analysis.py puts them
together, and figures.py, render.py and table.py show the result.

publish.py keeps an execution in published/, and library.py reads all that is kept: claims.py (with
measurements.py, prefix_work.py and line_counts.py) and questions.py make docs/claims.md and
docs/questions.md from it. browser.py shows pages to a Chromium.

Pictures are files: whatever backend a shell or a notebook has chosen, and this interpreter may not
have, is none of ours.
"""

import os

# read, and refused if it is unknown, when matplotlib is first imported
os.environ["MPLBACKEND"] = "Agg"
