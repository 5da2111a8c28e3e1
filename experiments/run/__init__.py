"""Executes a plan, from the checks before the first launch to the report and MLflow.

    execution    launches, gate, report, MLflow
    preflight    checks before the first launch what could fail after the last one
    progress     progress of a run and the time left
    tracking     writes MLflow runs from records
    mlflow_view  the params, metrics and tags of MLflow runs
    ui           MLflow's interface, with the address of each study's table

May import cluster and everything below it. The report is rendered in a separate process, because
`reports` is a layer above.
"""
