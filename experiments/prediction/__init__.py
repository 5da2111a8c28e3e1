"""What a study would measure on hardware that is not at hand: the engine's own scheduler in virtual
time, with a model of the duration of a step in place of the GPU.

    __main__         for the developer: fit the model, register predictions, compare them with records
    page             docs/prediction.md, from the comparison
    comparison       predictions beside the records of the study that they predict
    fitting          the model's coefficients, from published records
    view             what `python -m experiments predict` prints
    cells            a plan -> the predicted throughput of each cell, with an interval
    virtual_engine   scheduler, admission, prefix cache and step loop of the engine, on a virtual clock
    step_time        the time of a step: parts on the GPU, and what the host does for it
    step_work        what a step has to do, counted from its plan
    cards            what is known of a GPU and its host
    shapes           the sizes of the presets, without their weights

Imports point down. No part of a prediction imports torch. What is predicted is always marked so:
`"evidence": "predicted"`, and never mixed with measured records. docs/prediction.md says how far off
the predictions were.
"""
