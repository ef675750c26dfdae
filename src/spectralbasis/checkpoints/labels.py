"""Short names for several checkpoints at once."""

from collections.abc import Sequence
from pathlib import Path


def short_labels(sources: Sequence[str]) -> list[str]:
    """The shortest end of each path that tells them all apart; numbered where two are the same."""
    parts = [Path(source).parts or (source,) for source in sources]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        labels = ["/".join(part[-depth:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{index}: {source}" for index, source in enumerate(sources)]
