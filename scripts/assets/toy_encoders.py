"""Library models of the encoders at toy size, for the programs that train the shipped weights, and for tests.

Must know no path and no training.
"""

from __future__ import annotations

from typing import Any

VAE_CONFIG: dict[str, Any] = {
    "base_dim": 32,
    "z_dim": 16,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [True, True],
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 8,
    "latents_mean": [0.0] * 16,
    "latents_std": [1.0] * 16,
}
TEXT_LEN = 48
TEXT_WIDTH = 64
IMAGE_WIDTH = 64
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


def build_vae(**changes: Any) -> Any:
    """A random `AutoencoderKLWan` with 4x8x8 compression and 16 channels."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(**{**VAE_CONFIG, **changes})


def build_tokenizer() -> Any:
    """Word-level tokenizer of the embedded world: lower case, punctuation split off, `</s>` appended."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    from longtake.toy.captions import STOP_WORDS, VOCABULARY

    words = [PAD, END, UNKNOWN, *sorted(VOCABULARY), *STOP_WORDS]  # the last came later
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    # As `caption_parser.tokenize`: full stops carry nothing.
    core.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(r"\."), " ")])
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    core.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, words.index(END))])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, model_max_length=TEXT_LEN
    )


def build_text_model(vocab_size: int) -> Any:
    """A random `UMT5EncoderModel` of width 64."""
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocab_size,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=3,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def build_image_model() -> Any:
    """A random `CLIPVisionModel` of width 64: 16 patches and the class token."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=256,
            projection_dim=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
            hidden_act="gelu",
        )
    )
