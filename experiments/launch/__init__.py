"""Runs launches. A launch is one engine process that serves all workloads of a cell in a block.

    runner               runs the launches of a plan; survives Ctrl-C, kill -9 and power cuts
    engine_process       the process of a launch: starts an engine and serves the workloads
    over_time            serves requests that arrive over time, and searches for the highest rate
    fork_server          forks engine processes from a process that has imported their libraries
    fork_server_process  that process
    fairness             checks that comparisons of engines are fair, on plan and records

May import engines, host, load, records and workloads. Standard library only: runs on a bare GPU host.
"""
