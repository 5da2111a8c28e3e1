"""`make mutants`: small errors planted into the parts that decide, one at a time, and the tests that
notice them. docs/mutants.md is made from what was found.

operators    the errors: one is a change of a single place of a module's syntax tree
rooms        which modules are changed, and which tests have to notice
worker       one run of pytest in a process of its own, with a mutant planted or with probes
preload      what such a process has loaded when it starts
results      the file of results: one JSON object a line
run          all of it, side by side, as far as the time reaches
page         docs/mutants.md
judgements   survivors, judged by people (judgements.toml)

`python -m property_tests.mutants --help` lists the commands.
"""
