"""Keep `python -m spectralbasis` from importing modules from the working folder.

Python searches this folder first, even for its own modules, and it may come with a model from an unknown source. The
command `spectralbasis` and `python -P -m spectralbasis` never search it; here it is removed once Python has found this
package. So this module imports only what every interpreter has loaded.
"""

import os
import sys

_PACKAGE = "spectralbasis"


def leave_out() -> None:
    """Take the working folder off the path, if Python was started to run this package and did not find it there."""
    looking = sys.argv[:1] == ["-m"]  # what it is until Python has found the module that it was told to run
    if not looking or sys.flags.safe_path or sys.orig_argv[-len(sys.argv)] not in (_PACKAGE, f"-m{_PACKAGE}"):
        return
    home = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120
    if sys.path[:1] == [os.getcwd()] and sys.path[0] != home:  # noqa: PTH109
        del sys.path[0]
