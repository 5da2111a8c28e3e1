"""Where blocks run: on this machine, or on the workers of a Ray cluster.

    executor     runs the blocks of a plan, each whole on one machine
    dispatch     whole blocks to many workers, and their records home; knows nothing of Ray
    ray_workers  the workers of a Ray cluster; the only module that imports Ray (ADR 5)

May import launch, host and records. Runs on a bare GPU host: standard library, and Ray where it is
asked for.
"""
