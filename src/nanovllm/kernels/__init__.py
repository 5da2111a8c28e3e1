"""One operation = one signature, implementations side by side: torch/ (the oracle, any device)
first.
"""
