"""What the environments are made of, and the programs that make them: standard library only,
nothing is installed when they run.
"""
