"""The pictures of a report, and the browser that they are tested in.

    pictures     every picture, for a desk and for a phone
    ratio_plots  ratios with their intervals: forest, A/A panel, factors
    load_curves  latency against the rate, throughput against latency
    price_chart  price against speed of lossy configurations
    run_order    launches in the order in which they ran: drift would show here
    layout       widths, fonts and rows that all pictures share
    svg          Matplotlib figures as SVG text, themed by CSS
    browser      a headless Chromium, driven through a pipe

May import text.
"""
