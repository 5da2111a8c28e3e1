"""Model families, and what is read from a checkpoint's folder.

families            the registry: architecture -> file of its family
qwen3               Qwen3ForCausalLM                         (a family's file is loaded when a checkpoint names it)
qwen3_moe           Qwen3MoeForCausalLM: mixtures of experts
qwen2               Qwen2ForCausalLM: Qwen2 and Qwen2.5
llama               LlamaForCausalLM: Llama 2 and 3, SmolLM2
mistral             MistralForCausalLM
config              config.json -> ModelConfig
loader              safetensors -> this rank's shards
hub                 a preset or a hub id -> its folder       (loaded when the name is no folder)
weight_files        shards, indexes and leftovers of weights (loaded when there are several files)
generated           weights made on the device               (loaded when the checkpoint has none)
tokenizer_files     files beside tokenizer.json              (loaded when they say more than it does)
sampling_defaults   generation_config.json -> SamplingParams (loaded when none are given)
checkpoint          builds small seeded checkpoints; for tests and studies

Imports point down: loader -> hub -> checkpoint -> weight_files, generated -> layers; a family's
file -> layers; mistral -> llama; qwen3_moe -> qwen3; config -> families. Nothing here imports the engine.
"""
