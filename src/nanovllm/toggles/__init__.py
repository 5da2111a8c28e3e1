"""The optimizations: what each can be, where it can run, and whether it ran.

table          `Optimizations`, a field per optimization with its row: all that is known of it; BASELINE and ALL
row            what a row says                                        (loaded when an optimization is asked for)
availability   what 'auto' becomes, and which level cannot run here   (loaded when an optimization is asked for)
vllm_names     vLLM's arguments -> ours                               (loaded when one is given)
counters       level, engaged and opportunity of each, after a run    (loaded when asked for)

No torch. Imports point down: vllm_names -> table -> availability, counters -> row -> engine.stats.
"""
