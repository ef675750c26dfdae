"""The action `similarity`: how much trained coefficients of several tasks are alike."""

from spectralbasis.coefficients.similarity import similarity as similarity_of
from spectralbasis.study.runs import Outcome, Run, Site


def similarity(run: Run, site: Site) -> Outcome:
    """Cosines between the coefficients of spectral adapters on one basis.

    The needs are `adapter_0`, `adapter_1`, …; the setting `tasks` says in their order what each was tuned to.

    Returns:
        `tasks`, and `cosines`, a table (adapters, adapters) over all matrices at once.
    """
    tasks = run.settings["tasks"]
    found = similarity_of([site.needs[f"adapter_{number}"] for number in range(len(tasks))], of="coefficients")
    assert found.coefficients is not None  # it was asked for
    return Outcome({"tasks": tasks, "cosines": found.coefficients.to_numpy().tolist()})
