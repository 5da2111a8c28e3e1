"""Reports: pure statistics over records, and the pages rendered from them.

records.py reads the files, counting.py decides what counts, metrics.py takes figures from a record, intervals.py does
the statistics of one effect, contrasts.py those of a whole design, ceiling.py the roofline bound, consistency.py the
checks of a record against itself; analysis.py puts them together, and figures.py, render.py and table.py show the
result.
"""
