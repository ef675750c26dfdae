"""The commands of the command line, in the order in which its help lists them."""

from spectralbasis.commands.adapter_commands import combine, doctor, export, extract, report
from spectralbasis.commands.checkpoint_commands import basis, compare, similarity
from spectralbasis.commands.serving_commands import bank, serve
from spectralbasis.commands.training_commands import evaluate, predict, quickstart, study, tune

COMMANDS = (
    quickstart,
    basis,
    compare,
    extract,
    tune,
    evaluate,
    predict,
    serve,
    similarity,
    study,
    report,
    doctor,
    export,
    combine,
)

GROUPS = {"bank": bank}
"""Name → commands that stand under it."""
