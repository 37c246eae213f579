"""How large a demo Omni is, and its config.json and other configs in the published spelling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import OptionError

# Distances from the first special id and from the number of codes, as published (151643 and 8192).
END_OF_TEXT, IM_START, IM_END = 0, 1, 2
AUDIO, AUDIO_BOS, AUDIO_EOS = 3, 4, 5
VISION_BOS, VISION_EOS, VISION_PAD, IMAGE, VIDEO = 9, 10, 11, 12, 13
TTS_PAD, TTS_BOS, TTS_EOS = 216, 217, 218
VOICE_BOS = {"Chelsie": 229, "Ethan": 227}
SPECIAL_IDS = 230
CODEC_PAD, CODEC_BOS, CODEC_EOS, CODEC_MASK = 100, 101, 102, 104
CODEC_IDS = 256

DIT_ROPE_THETA = 10000.0
MEL_BINS = 80
SPEAKER_WIDTH = 192
UPSAMPLE_RATES = (5, 3, 2, 2, 2, 2)
"""240 samples per mel frame, two frames per code."""

PREPROCESSOR_CONFIG = {
    "chunk_length": 300,
    "dither": 0.0,
    "feature_extractor_type": "WhisperFeatureExtractor",
    "feature_size": 128,
    "hop_length": 160,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "Qwen2VLImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "max_pixels": 12845056,
    "merge_size": 2,
    "min_pixels": 3136,
    "n_fft": 400,
    "n_samples": 4800000,
    "nb_max_frames": 30000,
    "padding_side": "right",
    "padding_value": 0.0,
    "patch_size": 14,
    "processor_class": "Qwen2_5OmniProcessor",
    "return_attention_mask": True,
    "sampling_rate": 16000,
    "temporal_patch_size": 2,
}
"""preprocessor_config.json as published."""


@dataclass(frozen=True)
class DemoSize:
    """The widths and depths of an Omni; everything else (ids, rates, windows, upsampling) is as published.

    `vocab_size` leaves room for 230 ids from `first_special_id` on, and that for 256 bytes and the `WORDS`. `codes` is
    the codec's size without its special ids. Every input width of a thinker linear is a multiple of `group_size`.
    """

    vocab_size: int = 640
    first_special_id: int = 384
    hidden: int = 128
    intermediate: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    group_size: int = 32
    vision_hidden: int = 64
    vision_intermediate: int = 108
    vision_layers: int = 4
    vision_heads: int = 2
    full_attention_layers: tuple[int, ...] = (1, 3)
    audio_hidden: int = 64
    audio_layers: int = 2
    audio_heads: int = 2
    codes: int = 128
    talker_hidden: int = 96
    talker_intermediate: int = 192
    talker_layers: int = 2
    talker_heads: int = 4
    talker_kv_heads: int = 2
    talker_head_dim: int = 32
    dit_hidden: int = 64
    dit_layers: int = 5
    dit_heads: int = 4
    look_ahead_layers: tuple[int, ...] = (2,)
    look_backward_layers: tuple[int, ...] = (0, 4)
    speaker_channels: int = 32
    vocoder_channels: int = 128
    shard_bytes: int = 2_000_000

    def __post_init__(self) -> None:
        if self.vocab_size < self.first_special_id + SPECIAL_IDS:
            raise OptionError(
                f"vocab_size {self.vocab_size} has no room for {SPECIAL_IDS} ids from {self.first_special_id} on"
            )
        for name in ("hidden", "intermediate"):
            if getattr(self, name) % self.group_size:
                raise OptionError(f"{name} is {getattr(self, name)}, not a multiple of group_size {self.group_size}")


TINY = DemoSize(
    hidden=64,
    intermediate=96,
    layers=2,
    heads=2,
    kv_heads=1,
    vision_hidden=32,
    vision_intermediate=44,
    vision_layers=2,
    full_attention_layers=(1,),
    audio_hidden=32,
    talker_hidden=48,
    talker_intermediate=64,
    talker_heads=2,
    talker_kv_heads=1,
    dit_hidden=32,
    dit_layers=3,
    dit_heads=2,
    look_ahead_layers=(1,),
    look_backward_layers=(0, 2),
    speaker_channels=16,
    vocoder_channels=64,
    shard_bytes=500_000,
)
"""For tests that build many."""


def omni_config(size: DemoSize, *, user_id: int, quantized: bool, dtype: str) -> dict[str, Any]:
    """config.json in the published spelling (rope_scaling, *_token_index, torch_dtype)."""
    config = {
        "architectures": ["Qwen2_5OmniForConditionalGeneration"],
        "enable_audio_output": True,
        "enable_talker": True,
        "model_type": "qwen2_5_omni",
        "thinker_config": _thinker_config(size, user_id, dtype),
        "talker_config": _talker_config(size, dtype),
        "token2wav_config": _token2wav_config(size),
        "torch_dtype": dtype,
    }
    if quantized:
        config["quantization_config"] = {
            "bits": 4,
            "group_size": size.group_size,
            "modules_to_not_convert": ["visual"],
            "quant_method": "awq",
            "version": "gemm",
            "zero_point": True,
        }
    return config


def _media_ids(size: DemoSize) -> dict[str, int]:
    first = size.first_special_id
    return {
        "audio_token_index": first + AUDIO,
        "audio_start_token_id": first + AUDIO_BOS,
        "audio_end_token_id": first + AUDIO_EOS,
        "image_token_index": first + IMAGE,
        "video_token_index": first + VIDEO,
        "vision_start_token_id": first + VISION_BOS,
        "vision_end_token_id": first + VISION_EOS,
        "position_id_per_seconds": 25,
        "seconds_per_chunk": 2,
    }


def _decoder_config(head_dim: int) -> dict[str, Any]:
    pairs = head_dim // 2
    sections = [pairs // 4, pairs * 3 // 8, pairs * 3 // 8]  # time, height, width: 16, 24, 24 for heads of 128
    return {
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_section": sections, "rope_type": "default", "type": "default"},
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "use_cache": True,
        "use_sliding_window": False,
    }


def _thinker_config(size: DemoSize, user_id: int, dtype: str) -> dict[str, Any]:
    first = size.first_special_id
    return {
        "model_type": "qwen2_5_omni_thinker",
        "bos_token_id": first + IM_START,
        "eos_token_id": first + IM_END,
        "pad_token_id": first + END_OF_TEXT,
        "user_token_id": user_id,
        "vision_token_id": first + VISION_PAD,
        "torch_dtype": dtype,
        **_media_ids(size),
        "audio_config": {
            "model_type": "qwen2_5_omni_audio_encoder",
            "activation_function": "gelu",
            "d_model": size.audio_hidden,
            "encoder_attention_heads": size.audio_heads,
            "encoder_ffn_dim": 4 * size.audio_hidden,
            "encoder_layers": size.audio_layers,
            "max_source_positions": 1500,
            "n_window": 100,
            "num_hidden_layers": size.audio_layers,
            "num_mel_bins": 128,
            "output_dim": size.hidden,
        },
        "vision_config": {
            "model_type": "qwen2_5_omni_vision_encoder",
            "depth": size.vision_layers,
            "fullatt_block_indexes": list(size.full_attention_layers),
            "hidden_act": "silu",
            "hidden_size": size.vision_hidden,
            "in_channels": 3,
            "intermediate_size": size.vision_intermediate,
            "num_heads": size.vision_heads,
            "out_hidden_size": size.hidden,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "tokens_per_second": 25,
            "window_size": 112,
        },
        "text_config": {
            "model_type": "qwen2_5_omni_text",
            "hidden_size": size.hidden,
            "intermediate_size": size.intermediate,
            "num_attention_heads": size.heads,
            "num_hidden_layers": size.layers,
            "num_key_value_heads": size.kv_heads,
            "tie_word_embeddings": False,
            "vocab_size": size.vocab_size,
            **_decoder_config(size.hidden // size.heads),
        },
    }


def _talker_config(size: DemoSize, dtype: str) -> dict[str, Any]:
    first, codes = size.first_special_id, size.codes
    return {
        "model_type": "qwen2_5_omni_talker",
        "embedding_size": size.hidden,
        "head_dim": size.talker_head_dim,
        "hidden_size": size.talker_hidden,
        "intermediate_size": size.talker_intermediate,
        "num_attention_heads": size.talker_heads,
        "num_hidden_layers": size.talker_layers,
        "num_key_value_heads": size.talker_kv_heads,
        "spatial_merge_size": 2,
        "torch_dtype": dtype,
        "tts_codec_end_token_id": codes + CODEC_EOS,
        "tts_codec_mask_token_id": codes + CODEC_MASK,
        "tts_codec_pad_token_id": codes + CODEC_PAD,
        "tts_codec_start_token_id": codes + CODEC_BOS,
        "tts_text_end_token_id": first + TTS_EOS,
        "tts_text_pad_token_id": first + TTS_PAD,
        "tts_text_start_token_id": first + TTS_BOS,
        "vocab_size": codes + CODEC_IDS,
        **_media_ids(size),
        **_decoder_config(size.talker_head_dim),
    }


def _token2wav_config(size: DemoSize) -> dict[str, Any]:
    channels = size.speaker_channels
    return {
        "model_type": "qwen2_5_omni_token2wav",
        "dit_config": {
            "model_type": "qwen2_5_omni_dit",
            "block_size": 24,
            "dropout": 0.1,
            "emb_dim": size.dit_hidden // 2,
            "enc_attention_channels": channels // 4,
            "enc_channels": [channels, channels, channels, channels, 3 * channels],
            "enc_dilations": [1, 2, 3, 4, 1],
            "enc_dim": channels // 2,
            "enc_emb_dim": SPEAKER_WIDTH,
            "enc_kernel_sizes": [5, 3, 3, 3, 1],
            "enc_res2net_scale": 2,
            "enc_se_channels": channels // 4,
            "ff_mult": 2,
            "head_dim": size.dit_hidden // size.dit_heads,
            "hidden_size": size.dit_hidden,
            "look_ahead_layers": list(size.look_ahead_layers),
            "look_backward_layers": list(size.look_backward_layers),
            "mel_dim": MEL_BINS,
            "num_attention_heads": size.dit_heads,
            "num_embeds": size.codes + 1,
            "num_hidden_layers": size.dit_layers,
            "repeats": 2,
            "rope_theta": DIT_ROPE_THETA,
        },
        "bigvgan_config": {
            "model_type": "qwen2_5_omni_bigvgan",
            "mel_dim": MEL_BINS,
            "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5], [1, 3, 5]],
            "resblock_kernel_sizes": [3, 7, 11],
            "upsample_initial_channel": size.vocoder_channels,
            "upsample_kernel_sizes": [11, 7, 4, 4, 4, 4],
            "upsample_rates": list(UPSAMPLE_RATES),
        },
    }


def generation_config(size: DemoSize) -> dict[str, Any]:
    """generation_config.json: answers end at either of two ids, and are greedy."""
    first = size.first_special_id
    return {
        "bos_token_id": first + END_OF_TEXT,
        "do_sample": False,
        "eos_token_id": [first + IM_END, first + END_OF_TEXT],
        "pad_token_id": first + END_OF_TEXT,
    }
