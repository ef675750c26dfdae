"""The methods, by name."""

from spectralbasis.errors import InputError
from spectralbasis.study.methods import bottlenecks, low_rank, plain, subspace
from spectralbasis.study.methods.low_rank import allocate_ranks
from spectralbasis.study.methods.method import Method
from spectralbasis.study.methods.options import MethodOptions
from spectralbasis.study.methods.spectral import SPECTRAL_RATE, spectral, svft

SPECTRAL = frozenset({"coefficients", "bandwidth", "scaling", "basis", "leading", "budget"})
SVFT = frozenset({"coefficients", "bandwidth", "scaling", "budget"})
RANK = frozenset({"rank"})
LORA = frozenset({"rank", "alpha"})
FOURIER = frozenset({"n_frequency"})
TINY = frozenset({"rank", "dimension"})
SUBSPACE = frozenset({"dimension"})
FUSED = frozenset({"sources"})

METHODS = {
    method.name: method
    for method in (
        Method("spectral", spectral, SPECTRAL_RATE, 6e-3, SPECTRAL),
        Method("full", plain.full, 1e-4, 1e-3, writes="model"),
        Method("head", plain.head, None, 5e-2, writes="model"),
        Method("lora", low_rank.lora, 1e-3, 6e-3, LORA, {"rank": 8}),
        Method("bitfit", plain.bitfit, 2e-3, 6e-3, writes="trained"),
        Method("dora", low_rank.dora, 1e-3, 6e-3, LORA, {"rank": 8}),
        Method("pissa", low_rank.pissa, 5e-4, 6e-3, RANK, {"rank": 8}),
        Method("adalora", low_rank.adalora, 5e-3, 6e-3, LORA, {"rank": 8}, callbacks=allocate_ranks),
        Method("vera", low_rank.vera, 1e-2, 6e-3, RANK, {"rank": 256}),
        Method("fourierft", low_rank.fourierft, 5e-2, 6e-3, FOURIER, {"n_frequency": 1000}),
        Method("psoft", low_rank.psoft, 5e-3, 6e-3, RANK, {"rank": 32}),
        Method("tinylora", low_rank.tinylora, 1e-2, 6e-3, TINY, {"rank": 2, "dimension": 64}),
        Method("houlsby", bottlenecks.bottleneck("houlsby"), 1e-3, 6e-3, RANK, {"rank": 8}, "trained"),
        Method("parallel", bottlenecks.bottleneck("parallel"), 1e-3, 6e-3, RANK, {"rank": 8}, "trained"),
        Method("adapterfusion", bottlenecks.adapterfusion, 1e-4, 6e-3, FUSED, writes="trained"),
        Method("svft", svft, SPECTRAL_RATE, 6e-3, SVFT),
        Method("subspace", subspace.subspace, 1e-2, 6e-3, SUBSPACE, {"dimension": 1000}, "trained"),
    )
}


def find_method(name: str) -> Method:
    """The method of this name.

    Raises:
        InputError: there is none.
    """
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}; the known ones are {', '.join(METHODS)}")
    return METHODS[name]


def check_options(method: Method, options: MethodOptions) -> None:
    """Refuse options that a method would ignore.

    Raises:
        InputError: one of them was set.
    """
    for name in options.changed():
        if name not in method.options:
            owners = ", ".join(owner.name for owner in METHODS.values() if name in owner.options)
            raise InputError(f"the option {name} means nothing to the method {method.name}; it belongs to {owners}")
