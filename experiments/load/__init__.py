"""Load over time: when requests arrive, how an engine is driven, and whether the load was delivered.

    arrivals     arrival processes: parameters in, a schedule of due times out
    traces       recorded traces as JSON lines, and converters of published formats
    objective    service level objectives (SLOs), and which requests meet one
    driving      feeds requests to an engine when they are due, and notes every token's time
    own_answers  conversations whose next turn holds the engine's own answer
    delivered    what the generator delivered, and the rules that make a launch invalid
    searching    the highest rate at which an objective holds

Standard library only: runs on a bare GPU host. docs/methodology.md, "Under load", says why.
"""
