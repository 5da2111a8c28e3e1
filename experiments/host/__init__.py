"""The machine that measurements are made on. Standard library only.

    telemetry     what the machine did while a launch ran: load, clocks, memory, GPUs
    validity      rules that mark a launch invalid for what the machine did while it ran
    provenance    what a record was made with: code, interpreter, packages, machine
    environment   the environment variables of every process that the laboratory starts
    machine_lock  one measurement at a time on a machine, or on a GPU
    model_files   where the checkpoint of a plan lies, and whether it is the one that it means

May import records.
"""
