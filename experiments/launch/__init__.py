"""One launch after the other: an engine in a fresh process, measured while it serves.

    runner               carries out the launches of a plan; survives Ctrl-C, kill -9, power cuts
    engine_process       the process of one launch: starts an engine, serves the workloads
    fork_server          starts launches as forks of a process that has imported their libraries
    fork_server_process  that process
    fairness             is a comparison of engines fair? Checked on plan and records

May import engines, host, records and workloads. Standard library only: runs on a bare GPU host.
"""
