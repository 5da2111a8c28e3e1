"""Hypothesis profiles."""

from property_tests import profiles

profiles.register()
