"""The commands of the command line, in the order in which its help lists them."""

from spectralbasis.commands.adapter_commands import combine, doctor, export, extract, report
from spectralbasis.commands.checkpoint_commands import basis, compare, similarity
from spectralbasis.commands.training_commands import evaluate, quickstart, study, tune

COMMANDS = (quickstart, basis, compare, extract, tune, evaluate, similarity, study, report, doctor, export, combine)
