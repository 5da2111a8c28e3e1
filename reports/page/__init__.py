"""What a report says, and how it is shown.

    document          a report as data: sections of words, pictures and tables
    overview          what everybody reads: the table of results, the workloads
    sections          the statistics behind it, section by section
    compare_sections  what only a comparison of engines has
    price_section     what lossy configurations cost, beside their speeds
    load_sections     what only a study under load has, and energy
    model_sections    the linear model of a factorial, and its residuals
    evidence          why the results may be believed, and how to reproduce them
    render            a document as HTML and Markdown
    table             the result on the terminal, in 80 columns

May import figures, analysis, statistics and text.
"""
