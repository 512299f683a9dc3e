"""The tensors of Wan's transformers as their repositories hold them (specification A.2)."""

from __future__ import annotations

from longtake.models.sizes import DiTConfig


def _linear(name: str, other: str, out: int, into: int) -> dict[str, tuple[tuple[int, ...], str]]:
    return {f"{name}.weight": ((out, into), f"{other}.weight"), f"{name}.bias": ((out,), f"{other}.bias")}


def _norm(name: str, other: str, width: int) -> dict[str, tuple[tuple[int, ...], str]]:
    return {f"{name}.weight": ((width,), f"{other}.weight"), f"{name}.bias": ((width,), f"{other}.bias")}


def published_table(c: DiTConfig) -> dict[str, tuple[tuple[int, ...], str]]:
    """Specification A.2: original key -> (shape, diffusers key)."""
    d, i, embed = c.dim, c.image_dim, "condition_embedder"
    table = {
        "patch_embedding.weight": ((d, c.in_channels, 1, 2, 2), "patch_embedding.weight"),
        "patch_embedding.bias": ((d,), "patch_embedding.bias"),
        **_linear("text_embedding.0", f"{embed}.text_embedder.linear_1", d, 4096),
        **_linear("text_embedding.2", f"{embed}.text_embedder.linear_2", d, d),
        **_linear("time_embedding.0", f"{embed}.time_embedder.linear_1", d, 256),
        **_linear("time_embedding.2", f"{embed}.time_embedder.linear_2", d, d),
        **_linear("time_projection.1", f"{embed}.time_proj", 6 * d, d),
        "head.modulation": ((1, 2, d), "scale_shift_table"),
        **_linear("head.head", "proj_out", 4 * c.out_channels, d),
    }
    if i is not None:
        table |= _norm("img_emb.proj.0", f"{embed}.image_embedder.norm1", i)
        table |= _linear("img_emb.proj.1", f"{embed}.image_embedder.ff.net.0.proj", i, i)
        table |= _linear("img_emb.proj.3", f"{embed}.image_embedder.ff.net.2", d, i)
        table |= _norm("img_emb.proj.4", f"{embed}.image_embedder.norm2", d)
    if c.image_positions is not None:
        table["img_emb.emb_pos"] = ((1, c.image_positions, i or 0), f"{embed}.image_embedder.pos_embed")
    for n in range(c.num_layers):
        p = f"blocks.{n}."
        table[p + "modulation"] = ((1, 6, d), p + "scale_shift_table")
        table |= _norm(p + "norm3", p + "norm2", d)
        table |= _linear(p + "ffn.0", p + "ffn.net.0.proj", c.ffn_dim, d)
        table |= _linear(p + "ffn.2", p + "ffn.net.2", d, c.ffn_dim)
        for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2")):
            for a, b in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0")):
                table |= _linear(f"{p}{ours}.{a}", f"{p}{theirs}.{b}", d, d)
            for a in ("norm_q", "norm_k"):
                table[f"{p}{ours}.{a}.weight"] = ((d,), f"{p}{theirs}.{a}.weight")
        if i is not None:
            table |= _linear(p + "cross_attn.k_img", p + "attn2.add_k_proj", d, d)
            table |= _linear(p + "cross_attn.v_img", p + "attn2.add_v_proj", d, d)
            table[p + "cross_attn.norm_k_img.weight"] = ((d,), p + "attn2.norm_added_k.weight")
    return table
