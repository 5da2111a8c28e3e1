"""What a request may ask for beyond greedy, top-k and top-p sampling, and its errors. Each file is
loaded when a request asks for what it has; nothing here costs anything before.

options           SamplingParamsWithOptions: all of vLLM's sampling parameters that are built
sequences         a request with options: when it stops, what its text is
stop_strings      finds stop strings in a text that grows token by token
logit_processors  what options do to the logits, on the device
several           n > 1: several answers to one prompt
chat              conversations, and the chat template of a checkpoint
refusals          what is wrong with a prompt
interrupted       a step that failed or was interrupted: what is left of the engine

options, several, refusals and interrupted work without torch and tokenizers. Imports point down: sequences -> stop_strings,
options. The engine loads these by name, as the sampling parameters load `options`.
"""
