"""Checkpoints that other people made."""

import pytest
import torch

from spectralbasis.checkpoints import logical_matrices, match_matrices, open_checkpoint


@pytest.mark.data
def test_limu_bert_pair(data_dir):
    folder = data_dir / "limu_bert" / "x" / "weights"
    base, tuned = (open_checkpoint(folder / name) for name in ("limu_bert_x.pt", "limu_pretrain.pt"))
    found = match_matrices(base, tuned)
    pairs, skipped = found.pairs, found.skipped
    assert len(base.names()) == 29
    assert {ours.name for ours, _ in pairs} == {"embed.lin", "attn.proj_q", "attn.proj_k", "attn.proj_v", "proj",
                                                "pwff.fc1", "pwff.fc2", "linear"}  # fmt: skip
    assert set(skipped) == {"embed.pos_embed", "fc", "decoder"}
    assert all(not torch.equal(ours.read(), theirs.read()) for ours, theirs in pairs)


@pytest.mark.data
def test_limu_bert_siblings(data_dir):
    files = sorted((data_dir / "limu_bert" / "public" / "saved").glob("*/*.pt"))
    assert len(files) == 8
    counts = {file.parent.name.partition("_")[0]: len(logical_matrices(open_checkpoint(file))[0]) for file in files}
    assert counts == {"classifier": 7, "pretrain": 8}


@pytest.mark.data
def test_vision_transformers(data_dir):
    files = sorted((data_dir / "vit_mnist").glob("*.pt"))
    assert len(files) == 5
    for file in files:
        checkpoint = open_checkpoint(file)
        matrices, skipped = logical_matrices(checkpoint)
        fused = [name for name in checkpoint.names() if "to_qkv" in name]
        for name in fused:
            label = name.removeprefix("transformer.").removesuffix(".weight")
            parts = [matrices[f"{label}.{part}"].read() for part in ("query", "key", "value")]
            assert torch.equal(torch.cat(parts), checkpoint.read(name))
        assert set(skipped) == {"pos_embedding", "cls_token", "mlp_head.1"}


def test_minilm(minilm):
    checkpoint = open_checkpoint(minilm)
    matrices, skipped = logical_matrices(checkpoint)
    assert checkpoint.config["model_type"] == "bert"
    assert len(matrices) == 6 * 6 + 1
    assert {matrix.layer for matrix in matrices.values()} == {-1, 0, 1, 2, 3, 4, 5}
    assert len(skipped) == 3
    assert matrices["encoder.layer.5.output.dense"].read().shape == (384, 1536)
