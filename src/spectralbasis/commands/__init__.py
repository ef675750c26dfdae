"""The commands of the command line, in the order in which its help lists them."""

from spectralbasis.commands.adapter_commands import combine, doctor, export, extract, report
from spectralbasis.commands.checkpoint_commands import basis, compare, similarity
from spectralbasis.commands.training_commands import evaluate, predict, quickstart, study, tune

COMMANDS = (
    quickstart,
    basis,
    compare,
    extract,
    tune,
    evaluate,
    predict,
    similarity,
    study,
    report,
    doctor,
    export,
    combine,
)
