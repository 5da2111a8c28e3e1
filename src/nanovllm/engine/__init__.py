"""The engine: requests in, tokens out.

llm_engine            LLMEngine (add_request, step, abort) and LLM, its offline face
scheduler             what each step computes: queues, StepPlan, static batching
continuous_batching   batching=continuous and chunked, with preemption      (loaded when on)
priority              scheduling_policy='priority': order by rank instead of age (loaded when on)
admission             how many waiting requests may start                   (loaded when on)
overlap               overlap=True: the next step starts before the last one is read (loaded when on)
sequence              the state of one request
block_manager         which request owns which KV block
prefix_cache          prefix_cache=True: blocks shared by equal prefixes    (loaded when on)
model_runner          StepPlan -> model -> sampled tokens, eagerly
kv_cache              size and tensors of the KV cache
details               log-probabilities, and texts of unfinished requests   (loaded when asked for)
stats                 counters: the proof that a toggle did something
invariants            what must hold between two calls; for tests

Imports point down: llm_engine -> model_runner, overlap -> continuous_batching -> scheduler, admission ->
prefix_cache -> block_manager -> sequence, stats. Everything but llm_engine, model_runner, kv_cache and
details works without torch. Parts that an optimization adds are loaded by llm_engine when it is on; those of
other rooms are nanovllm.gpu, nanovllm.distributed and nanovllm.requests.
"""
