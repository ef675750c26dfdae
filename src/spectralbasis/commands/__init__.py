"""The commands of the command line, in the order in which its help lists them."""

from spectralbasis.commands.adapters import combine, export
from spectralbasis.commands.machine import doctor, report
from spectralbasis.commands.measuring import basis, compare, similarity
from spectralbasis.commands.tuning import evaluate, quickstart, study, tune

COMMANDS = (quickstart, basis, compare, tune, evaluate, similarity, study, report, doctor, export, combine)
