"""What is compared: the matrices of a base and their partners in finetuned checkpoints, and what finds no partner."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from spectralbasis.checkpoints import Checkpoint, Matrix, match_matrices, matrix_name, open_checkpoint
from spectralbasis.checkpoints.matching import Unpaired, laid_out_as
from spectralbasis.checkpoints.names import short_labels
from spectralbasis.errors import InputError


@dataclass
class Pairing:
    """A base, finetuned checkpoints by their labels, and the matrices that they have in common.

    Attributes:
        base: the pretrained checkpoint.
        tuned: label → finetuned checkpoint.
        bases: name → matrix of the base that has a partner.
        partners: name → label → matrix of the finetuned checkpoint.
        skipped: name, with the label where there are several → why it is not measured.
        unpaired: label → groups of matrices, of either side, that have no partner or cannot be read.
        shares: label → share of the model that the pairs make up, in [0, 1].
        failed: label → name → why a pair could not be measured, as where it holds NaN.
    """

    base: Checkpoint
    tuned: dict[str, Checkpoint]
    bases: dict[str, Matrix] = field(default_factory=dict)
    partners: dict[str, dict[str, Matrix]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    unpaired: dict[str, tuple[Unpaired, ...]] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    failed: dict[str, dict[str, str]] = field(default_factory=dict)

    def skip(self, label: str, name: str, reason: str) -> None:
        """Record why a matrix is not measured."""
        self.skipped[name if len(self.tuned) == 1 else f"{name} [{label}]"] = reason

    def fail(self, label: str, name: str, reason: str) -> None:
        """Record why a pair could not be measured."""
        self.skip(label, name, reason)
        self.failed.setdefault(label, {})[name] = reason

    def measured_share(self, label: str) -> float:
        """Share of the model that the pairs make up without those that could not be measured, in [0, 1]."""
        sizes = {name: prod(self.bases[name].shape) for name, partners in self.partners.items() if label in partners}
        lost = sum(sizes[name] for name in self.failed.get(label, ()))
        return self.shares[label] * (1 - lost / sum(sizes.values())) if lost else self.shares[label]


def open_pairs(
    base: Any, tuned: Sequence[Any], include: Sequence[str], exclude: Sequence[str], *, partial: bool = False
) -> Pairing:
    """Open checkpoints and pair the matrices of the base with those of each finetuned one; no weights are read.

    With `partial`, what an adapter adapts and the base lacks is listed as skipped; without, such an adapter is refused.

    Raises:
        InputError: there is no finetuned checkpoint, one cannot be opened, or nothing can be paired.
    """
    if not tuned:
        raise InputError("nothing to compare with: pass at least one finetuned checkpoint after the base")
    opened = open_checkpoint(base)
    checkpoints = [open_checkpoint(one, base=opened, partial=partial) for one in tuned]
    labels = short_labels([checkpoint.source for checkpoint in checkpoints])
    found = Pairing(opened, dict(zip(labels, checkpoints, strict=True)))
    for label, checkpoint in found.tuned.items():
        matching = match_matrices(opened, checkpoint, include=include, exclude=exclude)
        found.unpaired[label], found.shares[label] = matching.unpaired, matching.share
        for name, reason in matching.skipped.items():
            found.skip(label, name, reason)
        for parameter in getattr(checkpoint, "missing", ()):
            found.skip(label, matrix_name(parameter), f"adapted, but absent in {opened.source}")
        for before, after in matching.pairs:
            first = found.bases.get(before.name, before)
            if first.cut.transposed != before.cut.transposed:  # one finetuned side is a module, which tells, one is not
                if after.checkpoint.module_type(after.cut.tensor) is None:
                    before, after = first, laid_out_as(first, after)
                others = found.partners[before.name]
                others.update({label: laid_out_as(before, other) for label, other in others.items()})
            found.bases[before.name] = before
            found.partners.setdefault(before.name, {})[label] = after
    return found
