"""The version, in one place, and those of the libraries that results depend on."""

__version__ = "0.1.0"
_PACKAGES = ("spectralbasis", "torch", "numpy", "scipy", "pandas", "safetensors", "transformers", "tokenizers", "peft")


def library_versions() -> dict[str, str]:
    """Versions of Python, of this package and of the libraries that figures and scores depend on, by name."""
    import platform
    from importlib.metadata import version

    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}
