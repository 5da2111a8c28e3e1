"""`make check`: runs every pair of optimization levels, other engines, and deliberately broken
engines through the gate.

    run      runs a check from start to end
    work     draws the workloads
    pairs    chooses configurations that cover every pair of levels
    jobs     the jobs of a check, with the expected verdict of each
    serve    runs one job, in its own process and interpreter
    judging  runs the gate over all outputs
    page     the results as a table and a page
    results  the types of what a check writes

    real_text   a trained model on text: ten answers through the gate, and what text changes

May import all other rooms but run and cluster.
"""
