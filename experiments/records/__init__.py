"""Records of what was run and measured: append-only JSON lines. Standard library only, and
the engine's table of toggles.

    store           reads, writes and repairs records and plans
    reading         the readers behind it: strict for a run, lenient for a report
    ledger          tracks which launches of a plan are done and which are pending
    merged_folders  merges several folders of one plan into one
    types           the types of plans and records, as TypedDicts
    cell_names      what configurations are called for people: all off, all on, A/A twin, reference
    factor_levels   the notation of factor levels: on, off, a name or a number

Imports no other room.
"""
