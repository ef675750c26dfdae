"""Runs: what they are, the store that keeps them, and the runner that does those that are missing."""

from spectralbasis.study.runs.run import Action, Outcome, Record, Results, Run, Site, with_needs

__all__ = ["Action", "Outcome", "Record", "Results", "Run", "Site", "with_needs"]
