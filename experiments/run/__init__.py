"""Carries a plan out, from what is asked before the first launch to the report and MLflow.

    execution    from a plan to its table: launches, gate, report, MLflow
    preflight    what could refuse at the end is asked before the first launch
    progress     how far a run is, and how long it will still take
    tracking     the only writer of MLflow
    mlflow_view  what MLflow shows of a study and of a launch

May import cluster and everything below it. The report is rendered by a process of its own, because
reports/ stands above.
"""
