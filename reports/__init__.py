"""Reports: statistics over records, and the pages rendered from them.

Its rooms, from the top down; each imports only from those below it (import-linter checks it):

    __main__     python -m reports publish | published | claims | questions | ratio | ...
    claims/      everything made from all published records together
    page/        what a report says, and how it is shown
    figures/     the pictures
    analysis/    from records and their plan to the result of a study
    statistics/  intervals, contrasts, the roofline bound
    text         how numbers are written for people
    templates/   of HTML and Markdown
    published/   records worth keeping, and the pages made from them

Pictures are files: whatever backend a shell or a notebook has chosen, and this interpreter may not
have, is none of ours.
"""

import os

# read, and refused if it is unknown, when matplotlib is first imported
os.environ["MPLBACKEND"] = "Agg"
