"""From records and their plan to the result of a study.

    types              the types of an analysis: Effect, Counts, Analysis
    analyse            the whole analysis: one JSON-able dict, the same for the same input
    counting           which launches count, with a reason for every one left out
    promises           what the methodology promises of every launch, checked again from its record
    gate_lines         the gate's word on each output, recomputed from the figures it states
    consistency        checks of a launch record against itself and its plan
    compare            comparisons of engines: pair by pair, and whether they were fair
    gate_and_launches  the gate, the toggles, the order of the launches, the machine
    noise              whose variance an effect is judged by, and its family: a study's `statistics`
    unjudged           launches without a reference: measured, nothing concluded
    under_load         requests that arrive over time: latencies, goodput, sustainable rate; energy
    answer             a sentence for each workload, and what to know before believing it
    cells              one flat row for each configuration, for tools that show runs side by side
    names              what a report says of its configurations, and of what each optimization did

May import statistics and text.
"""
