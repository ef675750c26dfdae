"""The command line. Results go to stdout, everything else to stderr."""

import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Annotated

import typer

from spectralbasis.commands import COMMANDS, GROUPS
from spectralbasis.commands.training_commands import CLASSES
from spectralbasis.errors import InputError, SpectralBasisError
from spectralbasis.printable import printable
from spectralbasis.version import __version__

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Measure how finetuning changes the leading singular vectors of a model, and tune by spectral coefficients.",
    epilog="Add --debug to any command to see where an error comes from.",
)

NOISE = {
    "torchao": "Failed to load ",
    "torch.utils._pytree": " is an Enum subclass and is now natively supported ",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward ",
}
"""Logger → words of a warning that it gives whenever PEFT imports torchao and bitsandbytes, whether used or not."""
OUTDATED = "`is_gradient_checkpointing` is deprecated"
"""A warning that transformers 5 gives whenever PEFT wraps a model; a user of the command line cannot act on it."""


class _PrintableRecord(logging.LogRecord):
    """A log record whose message may quote names out of files, by whichever library."""

    def getMessage(self) -> str:
        return printable(super().getMessage(), lines=True)


def _show_printable() -> None:
    """Escape what a terminal would act on in the warnings and logs of this process."""
    logging.setLogRecordFactory(_PrintableRecord)
    plain = warnings.formatwarning
    warnings.formatwarning = lambda *args, **kwargs: printable(plain(*args, **kwargs), lines=True)


def _show_notes() -> None:
    """Write what the package says of its work, such as how a table is read, to stderr."""
    notes = logging.getLogger("spectralbasis")
    if not notes.handlers and os.environ.get("RANK", "0") == "0":  # among several processes the first one speaks
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        notes.addHandler(handler)
        notes.setLevel(logging.INFO)
        notes.propagate = False


def _without(words: str) -> Callable[[logging.LogRecord], bool]:
    """A filter that drops the log records that hold these words."""
    return lambda record: words not in record.getMessage()


warnings.filterwarnings("ignore", message=OUTDATED, category=FutureWarning)
for logger, noise in NOISE.items():
    logging.getLogger(logger).addFilter(_without(noise))


def main() -> None:
    """Run the command line; errors meant for people end as one paragraph and exit code 1."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    _show_printable()
    _show_notes()
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this process
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115
    try:
        if "\0" in "".join(arguments):
            raise InputError("an argument holds the character NUL, which no file name can hold; leave it out")
        if re.search("[\ud800-\udfff]", "".join(arguments)):  # how Python holds the bytes of such a name
            raise InputError("an argument is not valid UTF-8, so it cannot be written into results; rename the file")
        app(args=arguments, prog_name="spectralbasis")
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); Python would complain once more while flushing at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(error, SpectralBasisError):
            from spectralbasis.files import out_of_room  # which imports torch

            if out_of_room(error):
                error = InputError(f"the result cannot be written: {error.strerror}; write it elsewhere")
        if debug:
            print(printable(traceback.format_exc(), lines=True), file=sys.stderr)
        if isinstance(error, SpectralBasisError):
            print(f"error: {error}", file=sys.stderr)
        else:
            print(f"unexpected {type(error).__name__}: {printable(error, lines=True)}", file=sys.stderr)
            print("Run the command again with --debug to see where it comes from.", file=sys.stderr)
        sys.exit(1)


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options that stand before a command."""


for command in COMMANDS:
    app.command(**CLASSES.get(command, {}))(command)
for name, group in GROUPS.items():
    app.add_typer(group, name=name)
