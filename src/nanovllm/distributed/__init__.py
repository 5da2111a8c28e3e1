"""More than one process: tensor-parallel ranks and data-parallel replicas. Loaded when either is on.

data_parallel      ReplicatedLLM: whole engines behind one `generate`
sharing            which replica serves which request; no torch
workers            TensorParallelRunner: the runner's interface over several ranks
rank               one rank: holds a shard and runs the plans it is sent
collectives        the group of ranks: gloo on a CPU, NCCL on GPUs
symmetric_memory   all_reduce=symmetric_memory: small sums over memory that GPUs share
processes          child processes: how they are started, talk, fail and end
wire               messages between the engine and its ranks; no torch

Imports point down, in this order; workers and rank do not import each other. Below this room: engine, gpu, models,
layers and kernels. Nothing there imports it; the engine loads it by name.
"""
