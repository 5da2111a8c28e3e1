"""Everything made from all published records together.

    published_studies  the records under reports/published
    publish            keeps an execution there, in as few bytes as it takes
    claims             docs/claims.md: published claims beside what was measured here
    measurements       the figures behind the claims
    questions          docs/questions.md
    prefix_work        how much arithmetic the prefix cache saved in a recorded launch
    predictions        what a model says of the claims' hardware; it decides nothing
    scaling_model      a modelled scaling curve, labelled as a model
    results_index      docs/results.md: every published study, with its answer in one line
    engines_compared   the table of docs/comparing-engines.md
    short_answers      that answer, in at most two sentences
    line_counts        code lines of our engine and of vLLM, as published
    code_lines         counts code lines and statements

May import page, analysis and what lies below.
"""
