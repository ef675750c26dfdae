"""Tuning a model to a task, scoring it, and what is left of both in a folder."""
