"""What only a GPU needs. A run on a CPU loads nothing of this room.

cuda_graph      cuda_graphs=True: GraphRunner replays captured decode steps
machine         is there a usable GPU, can Triton run; one line that says what was chosen
runner          GpuRunner: ModelRunner with a memory plan and asynchronous copies
memory_plan     what an engine may use of a GPU's memory
rehearsal       compiles the kernels of the first steps while weights are loaded
workspaces      gives cuBLAS's workspaces back with the last engine
step_memory     what a step needs of the memory, measured
prefill_graph   short prefills captured and replayed
capture         captures work as a CUDA graph, and replays it

Imports point down, in this order. Below this room: engine (model_runner, kv_cache, scheduler,
stats), models, layers, kernels, toggles.
"""
