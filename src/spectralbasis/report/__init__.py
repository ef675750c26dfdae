"""The HTML pages of comparisons and of studies."""

from spectralbasis.report.page import write_report
from spectralbasis.report.study_page import write_study_report

__all__ = ["write_report", "write_study_report"]
