"""Actions for tests of the runner, which workers can import."""

import errno
import os
import time
from pathlib import Path

import pandas as pd

from spectralbasis.errors import InputError
from spectralbasis.files import no_room_for
from spectralbasis.study.runs import Outcome, Run, Site


def act(run: Run, site: Site) -> Outcome:
    """Adds `value` to what its needs found, counts its calls in a file, and fails as it is told to."""
    settings = run.settings
    if "calls" in settings:
        with Path(settings["calls"]).open("a") as file:
            file.write(f"{run.key}\n")
    if settings.get("dies") and _calls(settings["calls"], run.key) <= settings["dies"]:
        os._exit(9)
    if "waits" in settings:
        time.sleep(0.02)
    if "refuses" in settings:
        raise InputError(settings["refuses"])
    if "full" in settings and Path(settings["full"]).exists():
        _write_on_a_full_disk()
    if "breaks" in settings:
        raise KeyError(settings["breaks"])
    total = settings["value"] + sum(int((folder / "total").read_text()) for folder in site.needs.values())
    (site.folder / "total").write_text(str(total))
    table = pd.DataFrame({"step": [0, 1], "value": [float(total), run.seed]}) if settings.get("measures") else None
    return Outcome({"total": total, "data": str(site.data)}, table)


def _write_on_a_full_disk() -> None:
    try:
        raise OSError(errno.ENOSPC, "No space left on device")
    except OSError as error:
        raise no_room_for(Path("weights")) from error


def _calls(file: str, key: str) -> int:
    return Path(file).read_text().split().count(key)
