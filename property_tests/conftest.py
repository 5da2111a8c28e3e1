"""Hypothesis profiles."""

from property_tests.support import profiles

profiles.register()
