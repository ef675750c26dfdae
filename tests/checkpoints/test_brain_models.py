"""Foundation models of EEG, fMRI and motion, in the files that their authors publish."""

import argparse

import pytest
import torch

import spectralbasis
from spectralbasis.checkpoints import logical_matrices, match_matrices, open_checkpoint


def labram(prefix="", head="head", classes=4):
    """LaBraM-base: 12 blocks of width 200 over patches of 200 samples, normalised queries and keys, no qkv bias."""
    width, heads, patches = 200, 10, 8
    state = {
        f"{prefix}cls_token": torch.zeros(1, 1, width),
        f"{prefix}pos_embed": torch.zeros(1, 129, width),
        f"{prefix}time_embed": torch.zeros(1, 16, width),
        f"{head}.weight": torch.zeros(classes, width),
        f"{head}.bias": torch.zeros(classes),
    }
    for index, kernel in enumerate(((patches, 1, 1, 15), (patches, patches, 1, 3), (patches, patches, 1, 3)), start=1):
        state[f"{prefix}patch_embed.conv{index}.weight"] = torch.randn(kernel)
        state[f"{prefix}patch_embed.conv{index}.bias"] = torch.zeros(patches)
        for kind in ("weight", "bias"):
            state[f"{prefix}patch_embed.norm{index}.{kind}"] = torch.ones(patches)
    for block in range(12):
        shapes = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.fc1": (4 * width, width),
                  "mlp.fc2": (width, 4 * width)}  # fmt: skip
        for layer, shape in shapes.items():
            state[f"{prefix}blocks.{block}.{layer}.weight"] = torch.randn(shape)
            if layer != "attn.qkv":
                state[f"{prefix}blocks.{block}.{layer}.bias"] = torch.zeros(shape[0])
        for norm, size in (("norm1", width), ("norm2", width), ("attn.q_norm", width // heads),
                           ("attn.k_norm", width // heads)):  # fmt: skip
            for kind in ("weight", "bias"):
                state[f"{prefix}blocks.{block}.{norm}.{kind}"] = torch.ones(size)
        state |= {f"{prefix}blocks.{block}.gamma_{i}": torch.full((width,), 0.1) for i in (1, 2)}
    return state | {f"{prefix}fc_norm.weight": torch.ones(width), f"{prefix}fc_norm.bias": torch.zeros(width)}


def test_labram_before_and_after_finetuning(tmp_path):
    pretrained = labram("student.", "lm_head", 64) | {
        "student.mask_token": torch.zeros(1, 1, 200),
        "projection_head.0.weight": torch.zeros(200, 200),
        "logit_scale": torch.tensor(1.0),
    }
    optimizer = {"state": {0: {"exp_avg": torch.ones(8, 8)}}, "param_groups": [{"lr": 5e-4}]}
    args = argparse.Namespace(batch_size=64, opt_betas=[0.9, 0.98], output_dir="./checkpoints")
    saved = {"model": pretrained, "optimizer": optimizer, "epoch": 49, "scaler": {"scale": 1.0}, "args": args}
    torch.save(saved, tmp_path / "labram-base.pth")
    torch.save({"model": labram(), "epoch": 30}, tmp_path / "finetuned.pth")

    base, tuned = (open_checkpoint(tmp_path / name) for name in ("labram-base.pth", "finetuned.pth"))
    found = match_matrices(base, tuned)
    pairs, skipped = found.pairs, found.skipped

    assert len(pairs) == 12 * 6 + 3
    assert set(skipped) == {
        "cls_token", "pos_embed", "time_embed", "mask_token", "lm_head", "projection_head.0", "head"
    }  # fmt: skip
    by_name = {ours.name: (ours, theirs) for ours, theirs in pairs}
    ours, theirs = by_name["blocks.11.attn.qkv.key"]
    assert (ours.layer, ours.kind, theirs.name) == (11, "attn.qkv.key", "blocks.11.attn.qkv.key")
    assert torch.equal(ours.read(), pretrained["student.blocks.11.attn.qkv.weight"][200:400])
    assert by_name["patch_embed.conv1"][0].shape == (8, 15)


def test_jepa_reads_the_target_encoder(tmp_path):
    encoder = {f"module.blocks.{i}.attn.qkv.weight": torch.full((12, 4), float(i)) for i in range(2)}
    target = {name: tensor + 1 for name, tensor in encoder.items()}
    predictor = {"module.predictor_blocks.0.attn.qkv.weight": torch.ones(12, 4)}
    moments = {"state": {0: {"exp_avg": torch.ones(12, 4)}}}
    saved = {"encoder": encoder, "predictor": predictor, "target_encoder": target, "opt": moments, "epoch": 300}
    torch.save(saved, tmp_path / "jepa-ep300.pth.tar")
    matrices, _ = logical_matrices(open_checkpoint(tmp_path / "jepa-ep300.pth.tar"))
    assert len(matrices) == 6
    assert matrices["blocks.1.attn.qkv.value"].read().unique().tolist() == [2.0]


@pytest.mark.parametrize("key", ["model_state_dict", "encoder"])
def test_masked_autoencoder_of_brain_recordings(key, tmp_path):
    state = {"module.vit.encoder.layer.0.attention.attention.query.weight": torch.randn(4, 4),
             "module.vit.embeddings.spatial_embedding_projection.weight": torch.randn(4, 3),
             "module.decoder.decoder_layers.0.output.dense.weight": torch.randn(4, 4)}  # fmt: skip
    torch.save({key: state, "epoch": 7, "optimizer_state_dict": {"state": {}}}, tmp_path / "brain.pt")
    matrices, skipped = logical_matrices(open_checkpoint(tmp_path / "brain.pt"))
    assert set(matrices) == {"encoder.layer.0.attention.attention.query", "embeddings.spatial_embedding_projection",
                             "decoder.decoder_layers.0.output.dense"}  # fmt: skip
    assert skipped == {}


@pytest.mark.data
def test_limu_bert_pair_is_compared(data_dir):
    folder = data_dir / "limu_bert" / "x" / "weights"
    result = spectralbasis.compare(folder / "limu_bert_x.pt", [folder / "limu_pretrain.pt"], leading=4, null=None)
    summary = result.summary()
    assert len(set(result.table.matrix)) == 8
    assert set(summary["skipped"]) == {"embed.pos_embed", "fc", "decoder"}
