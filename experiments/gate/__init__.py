"""Is the output right? Tokens are rescored by HF transformers and judged by fixed rules.

    judge              judges the tokens of a folder of records, one verdict per distinct output
    rules              from scores to pass or fail: the rule that rejects a wrong token
    verdicts           which tokens there are to judge, and how a verdict is written down
    same_work          the first rule: an engine that did other work has no speed to report
    rescoring          teacher forcing: what a reference says of every token that was produced
    reference_model    makes an HF model a reference: exact norms and angles, logits row by row
    scoring            what two models say of every token
    logit_margins      how far a token is from what the reference would have chosen
    truncation         what top-k and top-p keep of a vocabulary
    gumbel_noise       the engine's sampling noise, bit for bit, for less work
    significance       the statistics of the gate: binomial and normal limits
    negative_controls  models and tokens broken on purpose, which the gate must reject

May import host, records and workloads. Needs torch and transformers, nothing else: runs on a bare
GPU host. docs/methodology.md explains the rules.
"""
