"""`make check`: every configuration of the engine, its peers, and engines broken on purpose,
through the gate.

`pairs` chooses configurations, `work` draws what they serve, `jobs` says what has to come out of
each, `serve` runs one of them in its own process and interpreter, `judging` puts all of it through
the gate, `run` conducts, `page` shows.
"""
