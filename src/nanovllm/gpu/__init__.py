"""What only a GPU needs. Nothing here is loaded on a CPU.

machine         is there a usable GPU, can Triton run, and one line that says what was chosen
cuda_graph      cuda_graphs=True: GraphRunner replays captured decode steps
prefill_graph   short prefills captured and replayed
rehearsal       compiles the kernels of the first steps while weights are loaded
memory_plan     what an engine may take of a GPU's memory
step_memory     what a step takes of it, measured

Imports point down, in this order. Below this room: engine (model_runner, kv_cache, scheduler), models, layers, kernels.
"""
