"""Expands a study, a profile and a model into a plan.

    spec         the schemas of studies and profiles
    protocol     the parts of a study that say how it is carried out
    yaml_files   YAML validated by pydantic; errors name file, key, and what is allowed
    designs      the cells of a design, and the aliases of a fractional factorial
    block_count  the number of blocks of a study, and which effects it can detect
    work_size    cuts the work of a study to the time budget, by the measured speed of a GPU
    machine      the profile of this machine, measured and cached
    prompts      the token ids of texts, by the tokenizer and chat template of the plan's model
    plan         the list of all launches, in an order drawn from the seed of the study
    plan_view    the summary of a plan, printed before it runs
    profiles/    planning values for hardware that is not present

May import engines, host, records and workloads. Needs pydantic and YAML: it runs where the plan is
made, not on a bare GPU host.
"""
