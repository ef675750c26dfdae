"""Names of matrices: the same for a bare model and for one under a task head."""

# Attributes under which task models, trainers and PEFT keep the model proper (`base_model_prefix` in transformers).
# Words that name a part of some model (encoder, backbone, vision_model, language_model) are left out on purpose.
HEAD_PREFIXES = frozenset(
    """
    base_model module model transformer student teacher
    albert audio_spectrogram_transformer beit bert biogpt bit bros camembert canine clip convbert convnext convnextv2
    cvt data2vec_audio data2vec_text data2vec_vision deberta decision_transformer deit dinat dinov2
    dinov2_with_registers dinov3_convnext dinov3_vit distilbert efficientformer efficientnet electra ernie ernie_m esm
    flaubert fnet focalnet funnel glpn gpt_neox gpt_neox_japanese hgnetv2 hiera hubert ibert ijepa layoutlm layoutlmv2
    layoutlmv3 led levit lilt longformer luke lxmert markuplm mega mobilebert mobilenet_v1 mobilenet_v2 mobilevit
    mobilevitv2 mpnet mra nat nezha nystromformer perceiver poolformer pvt pvt_v2 realm reformer regnet rembert resnet
    roberta roberta_prelayernorm roc_bert roformer rwkv segformer sew siglip siglip2 splinter squeezebert swiftformer
    swin swinv2 tapas textnet timesformer unispeech unispeech_sat van videomae vilt visual_bert vit vivit wav2vec2
    wav2vec2_bert wav2vec2_conformer wavlm xlm_roberta yoso
    """.split()  # noqa: SIM905
)
# Components that compilers, sharding and adapters insert anywhere in a name.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"})
# Words that only say "the stack of layers" and tell two matrices of one layer number apart no further.
_STACKS = frozenset({"encoder", "layer", "layers", "h", "block", "blocks", "stages", "features", "resblocks"})
_EXPERTS = frozenset({"experts", "input_linear", "output_linear"})


def matrix_name(tensor_name: str) -> str:
    """The stable name for a tensor or module: without `.weight`, wrappers and the prefix of a task head.

    `bert.encoder.layer.0.output.dense.weight` and the module `encoder.layer.0.output.dense` are both
    `encoder.layer.0.output.dense`.
    """
    parts = plain_name(tensor_name).split(".")
    while len(parts) > 1 and parts[0] in HEAD_PREFIXES:
        parts = parts[1:]
    return ".".join(parts)


def plain_name(tensor_name: str) -> str:
    """The name without `.weight` and wrappers, but with every prefix."""
    parts = [part for part in tensor_name.split(".") if part not in _WRAPPERS] or [tensor_name]
    if len(parts) > 1 and parts[-1] == "weight":
        return ".".join(parts[:-1])
    return ".".join(parts).removesuffix("_weight") or tensor_name


def layer_number(name: str) -> int:
    """The first integer component of a matrix name, -1 where there is none."""
    return next((int(part) for part in name.split(".") if _is_number(part)), -1)


def kind_of(name: str) -> str:
    """What the matrix is within its layer: no layer prefix, layer number or expert number.

    A prefix that names another stack than the encoder stays (`decoder.self_attn.q_proj`), since layer and kind would
    otherwise not tell the two apart.
    """
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if _is_number(part)), None)
    if number is None:
        return name
    stack = [part for part in parts[:number] if part not in _STACKS]
    inner = [part for i, part in enumerate(parts) if i > number and not (_is_number(part) and parts[i - 1] in _EXPERTS)]
    return ".".join(stack + inner) or ".".join(parts[:number]) or "weight"


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdigit()
