"""Reports: statistics over records, and the pages rendered from them.

Its rooms, from the top down; each imports only from those below it (import-linter checks it):

    __main__     python -m reports publish | published | claims | questions | ratio | ...
    audit/       published records, judged again from scratch
    claims/      everything made from all published records together
    page/        what a report says, and how it is shown
    figures/     the pictures
    analysis/    from records and their plan to the result of a study
    switches     the rows of a study that measures each optimization alone and added last
    statistics/  intervals, contrasts, the roofline bound
    text         how numbers are written for people
    templates/   of HTML and Markdown
    published/   records worth keeping, and the pages made from them

Pictures are written to files, so the backend that a shell or a notebook has chosen, and that may be
missing here, is not used.
"""

import os

# read, and refused if it is unknown, when matplotlib is first imported
os.environ["MPLBACKEND"] = "Agg"
