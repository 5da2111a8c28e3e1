"""The optimizations: what each can be, where it can run, and whether it ran.

availability   which level runs on which machine, and what 'auto' becomes   (loaded when one is asked for)
vllm_names     vLLM's arguments -> ours                                     (loaded when one is given)
counters       level, engaged and opportunity of each, after a run          (loaded when asked for)

No torch, and nothing of the other rooms but the counters of engine.stats.
"""
