"""Checks that outputs are correct: tokens are rescored by HF transformers and judged by fixed rules.

    judge              judges the outputs of a folder of records, one verdict per distinct output
    rules              from scores to pass or fail: the rule that rejects a wrong token
    verdicts           finds the outputs to judge, and writes gate records
    same_work          the first rule: an engine must have done the work it was asked for
    rescoring          scores tokens with HF transformers, by teacher forcing
    reference_model    turns an HF model into an exact reference
    lossy/             what a quantized engine rounds, and the reference that rounds alike
    scoring            scores of every token from the logits of two models
    logit_margins      how far a token is from what the reference would have chosen, in logits
    truncation         min-p, top-k and top-p truncation of a vocabulary
    edited_logits      logits after bias, penalties, bad words and min_tokens
    gumbel_noise       the engine's sampling noise, bit for bit, at lower cost
    chance/            the statistical tests of the gate
    negative_controls  broken models and tokens, which the gate must reject

May import host, records and workloads. Needs torch and transformers, nothing else: runs on a bare
GPU host. docs/methodology.md explains the rules.
"""
