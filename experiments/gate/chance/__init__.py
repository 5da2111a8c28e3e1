"""What chance explains: the statistical tests of the gate, each with a stated level.

significance   tests of margins, counts and samples, with torch
event_counts   whether something happened more often than it may; without torch, as reports count again

Imports nothing else of the gate.
"""
