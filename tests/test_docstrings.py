"""Every public function and class shows how it is called, and the examples hold."""

import doctest
import inspect
from importlib import import_module

import pytest

NAMESPACES = ("spectralbasis", "spectralbasis.linalg", "spectralbasis.training")
WITHOUT_EXAMPLE = {
    "spectralbasis.CoefficientBank",
    "spectralbasis.Combination",
    "spectralbasis.LoraExport",
    "spectralbasis.MergedExport",
    "spectralbasis.Similarity",
    "spectralbasis.SpectralBasis",
    "spectralbasis.SpectralConfig",
    "spectralbasis.SpectralDriftCallback",
    "spectralbasis.SpectralModel",
    "spectralbasis.calibrate",
    "spectralbasis.combine",
    "spectralbasis.curvature_basis",
    "spectralbasis.export_lora",
    "spectralbasis.export_merged",
    "spectralbasis.gradient_coverage",
    "spectralbasis.open_checkpoint",
    "spectralbasis.parameter_groups",
    "spectralbasis.similarity",
    "spectralbasis.linalg.LeadingSVD",
    "spectralbasis.linalg.assigned_cosines",
    "spectralbasis.linalg.cross_cosines",
    "spectralbasis.linalg.gavish_donoho_threshold",
    "spectralbasis.linalg.gram_cosines",
    "spectralbasis.linalg.haar_overlap",
    "spectralbasis.linalg.haar_overlap_std",
    "spectralbasis.linalg.inner_products",
    "spectralbasis.linalg.largest_value_outside",
    "spectralbasis.linalg.leading_svd",
    "spectralbasis.linalg.leading_svd_and_values",
    "spectralbasis.linalg.marchenko_pastur_edge",
    "spectralbasis.linalg.matched_cosines",
    "spectralbasis.linalg.overlaps_by_k",
    "spectralbasis.linalg.parse_leading",
    "spectralbasis.linalg.principal_angles",
    "spectralbasis.linalg.resolve_leading",
    "spectralbasis.linalg.singular_values",
    "spectralbasis.linalg.subspace_error_bound",
    "spectralbasis.linalg.subspace_overlap",
    "spectralbasis.linalg.trailing_vectors",
    "spectralbasis.linalg.triplet_residuals",
    "spectralbasis.linalg.values_of_singular_vectors",
    "spectralbasis.linalg.vector_error_bounds",
    "spectralbasis.linalg.wedin_bound",
    "spectralbasis.training.EvaluateResult",
    "spectralbasis.training.LoadedModel",
    "spectralbasis.training.Method",
    "spectralbasis.training.MethodOptions",
    "spectralbasis.training.ParameterCounts",
    "spectralbasis.training.Task",
    "spectralbasis.training.TuneResult",
    "spectralbasis.training.evaluate",
    "spectralbasis.training.load_model",
    "spectralbasis.training.load_task",
    "spectralbasis.training.register_task",
    "spectralbasis.training.resolve_source",
    "spectralbasis.training.task_names",
    "spectralbasis.training.tune",
    "spectralbasis.training.write_tuning_table",
}
"""Public names that still lack an example: this only ever gets shorter."""


def public_objects():
    """Functions and classes of the public namespaces by their full names."""
    for namespace in NAMESPACES:
        module = import_module(namespace)
        for name in getattr(module, "__all__", ()):
            found = getattr(module, name)
            if inspect.isfunction(found) or (inspect.isclass(found) and not issubclass(found, Exception)):
                yield f"{namespace}.{name}", found


def examples_of(name, found):
    finder = doctest.DocTestFinder(recurse=inspect.isclass(found))
    tests = finder.find(found, name, module=inspect.getmodule(found), globs={})
    return [test for test in tests if test.examples]


OBJECTS = dict(public_objects())


def test_only_the_listed_names_lack_an_example():
    lacking = {name for name, found in OBJECTS.items() if not examples_of(name, found)}
    assert lacking == WITHOUT_EXAMPLE


@pytest.mark.parametrize("name", [name for name in OBJECTS if name not in WITHOUT_EXAMPLE])
def test_examples_hold(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    said: list[str] = []
    for test in examples_of(name, OBJECTS[name]):
        runner.run(test, out=said.append)
    assert runner.failures == 0, "".join(said)
    assert runner.tries > 0
