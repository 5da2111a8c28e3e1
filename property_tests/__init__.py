"""What must always be true, whatever the workload; and engines that are wrong, which these
properties must catch.

test_*_properties     the properties; `@holds` (support.profiles) makes them Hypothesis tests
support/              workloads, engines and helpers that they share
bad_implementations   patches that must be killed; kill, kill_matrix say by what
repeat                no false alarm in 50 repetitions
mutants/              small errors in the source, planted one at a time (`make mutants`)

Tests and kill import bad_implementations; everything here may import support.
"""
