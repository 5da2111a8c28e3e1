"""What was measured: JSON lines that are only ever appended to. Standard library only.

    store           reads, writes and repairs records and plans
    ledger          what has been done of a plan, and what is still to do
    merged_folders  folders of one plan, made in several visits, as one folder
    types           the shapes of plans and records, as TypedDicts
    factor_levels   how the level of a factor is written

Imports nothing of the laboratory.
"""
