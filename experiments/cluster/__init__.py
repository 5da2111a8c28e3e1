"""Runs the blocks of a plan on this machine or on the workers of a Ray cluster.

    executor     the local and the Ray executor
    dispatch     sends whole blocks to workers and collects their records; independent of Ray
    ray_workers  the workers of a Ray cluster; the only module that imports Ray (ADR 5)

May import launch, host and records. Runs on a bare GPU host: standard library, and Ray if it is
used.
"""
