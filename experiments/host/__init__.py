"""The machine that runs the measurements. Standard library only, but for what runs in a process of its own.

    cpu_power     power of the CPU packages, where the system lets it be read
    telemetry     telemetry of a launch: load, clocks, memory, GPUs
    validity      rules that mark a launch invalid because of other activity on the machine
    provenance    the provenance of a record: code, interpreter, packages, machine
    environment   the environment variables of all processes that the laboratory starts
    machine_lock  locks a machine or its GPUs during a measurement
    model_files   finds the checkpoint of a plan and compares its digest
    real_weights  the trained model of `make real-weights`: where it is, and how it is converted

May import records.
"""
