"""What the properties share; no tests.

strategies       whole workloads, drawn where mistakes are made
profiles         Hypothesis profiles; `@holds` makes a property a test
model_free       an engine without a model
checked_engine   the same, checked after every step, and the state machine that drives it
real_engine      the real engine on the embedded checkpoint, judged by HF transformers
ranks            tensor-parallel ranks in threads
plain_scores     the gate's scores, computed plainly
plain_forecast   admission's forecast, computed plainly

Nothing here imports a test or a bad implementation.
"""
