"""Judges published records again, from scratch: `python -m reports audit`.

checks.py     what is checked of one folder, each check with its outcome
git_files.py  the measured code of an earlier commit, and its digest
"""
