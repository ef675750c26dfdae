"""Quantized base layers: what PEFT knows of them, and their weights as dense tensors."""

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import (
    QuantizationBackend,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from torch import Tensor, nn

from spectralbasis.errors import InputError


def backend_of(layer: nn.Module, model: nn.Module | None = None) -> QuantizationBackend | None:
    """PEFT's backend of a quantized layer; None for a dense one.

    Args:
        layer: any module.
        model: that it is part of, which knows how torchao's layers are quantized again after a merge.
    """
    options = {} if model is None else get_quantization_kwargs(model)
    return resolve_quantization_backend(layer, **{"get_apply_tensor_subclass": _unknown_scheme, **options})


def dequantized(layer: nn.Module, backend: QuantizationBackend) -> Tensor:
    """The weight of a quantized layer, (m, n).

    Raises:
        InputError: the quantization keeps no way back to a dense weight.
    """
    base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    if backend.backend_name == "bnb 4bit":
        base.state_dict()  # inference on a CPU packs the weight in another order, which saving undoes
    try:
        return backend.get_base_weight(base).detach()
    except (TypeError, NotImplementedError) as error:
        raise InputError(
            f"a {type(base).__name__} quantized by {backend.backend_name} gives no dense weight; nothing can be merged "
            "into it, and its directions come from a basis file of the checkpoint that was quantized: "
            "spectralbasis basis MODEL -o FILE, then SpectralConfig(basis='FILE')"
        ) from error


def _unknown_scheme() -> None:
    raise InputError(
        "a merged torchao weight has to be quantized again, and the model does not say how; load it through "
        "transformers with quantization_config=TorchAoConfig(...), or export the adapter and merge it into the "
        "dense checkpoint"
    )
