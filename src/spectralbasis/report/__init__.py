"""The HTML page of a comparison."""

from spectralbasis.report.page import write_report

__all__ = ["write_report"]
