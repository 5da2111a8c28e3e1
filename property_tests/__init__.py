"""What must always be true, whatever the workload; and engines that are wrong, which these
properties must catch.

strategies            whole workloads, drawn where mistakes are made
checked, model_free   an engine without a model, checked after every step; the state machine
real_engine, ranks    the real engine on the embedded checkpoint, judged by HF transformers
test_*_properties     the properties; `@holds` (profiles) makes them Hypothesis tests
bad_implementations   patches that must be killed; kill, kill_matrix say by what
repeat                no false alarm in 50 repetitions
"""
