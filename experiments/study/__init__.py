"""What is to be run: from a study, a profile and a model to a plan.

    spec         studies and profiles as written in YAML, validated by pydantic
    protocol     the parts of a study that say how it is carried out
    yaml_files   YAML validated by pydantic models; errors name file, key, and what is allowed
    designs      which configurations a design runs, and what a fraction can tell apart
    block_count  how many blocks a study has, and which effects it can detect
    work_size    how much work a launch gets on a GPU, by measured speed and the time budget
    machine      the profile of this machine, measured and kept in the cache
    plan         every launch there will be, in an order drawn from the seed of the study
    plan_view    what a plan says of itself before it runs
    profiles/    planning values for hardware that is absent

May import engines, host, records and workloads. Needs pydantic and YAML: it runs where the plan is
made, not on a bare GPU host.
"""
