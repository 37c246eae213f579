"""The demo's tokenizer and chat template: byte-level BPE of a few words, special tokens where the model has them."""

from __future__ import annotations

import json
from pathlib import Path

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>", "<|box_end|>",
    "<|quad_start|>", "<|quad_end|>", "<|vision_bos|>", "<|vision_eos|>", "<|vision_pad|>", "<|IMAGE|>", "<|VIDEO|>",
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip
"""From the first special id on, as published."""

ROLES = ("system", "user", "assistant")
WORDS = (
    " a", " and", " are", " bird", " blue", " by", " cloud", " far", " for", " green",
    " hill", " in", " is", " light", " moon", " night", " of", " on", " rain", " river", " sea", " soft", " song",
    " star", " sun", " the", " to", " tree", " warm", " was", " we", " wind", " with", " you", "\n", ".", ",",
)  # fmt: skip
"""What the demo babbles in. The tokenizer knows these and the roles, each with all its beginnings."""

CHAT_TEMPLATE = """\
{%- set seen = namespace(image=0, audio=0, video=0) -%}
{%- for message in messages -%}
{%- if loop.first and message.role != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{{- '<|im_start|>' ~ message.role ~ '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}
{%- set seen.image = seen.image + 1 -%}
{{- ('Picture ' ~ seen.image ~ ': ' if add_vision_id else '') ~ '<|vision_bos|><|IMAGE|><|vision_eos|>' -}}
{%- elif part.type == 'audio' or 'audio' in part or 'audio_url' in part -%}
{%- set seen.audio = seen.audio + 1 -%}
{{- ('Audio ' ~ seen.audio ~ ': ' if add_audio_id else '') ~ '<|audio_bos|><|AUDIO|><|audio_eos|>' -}}
{%- elif part.type == 'video' or 'video' in part -%}
{%- set seen.video = seen.video + 1 -%}
{{- ('Video ' ~ seen.video ~ ': ' if add_vision_id else '') ~ '<|vision_bos|><|VIDEO|><|vision_eos|>' -}}
{%- elif 'text' in part -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


PRETOKENIZE_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen2 splits text before merging bytes (transformers' Qwen2Tokenizer)."""

NAMED_TOKENS = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
"""Attributes that the reference's processor asks its tokenizer for."""


def bpe(n_tokens: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary of `n_tokens` and its merges: 256 bytes, every beginning of every word, then filler.

    A word is merged from its front, one byte at a time. Fillers (" w0", " w1", ...) take up the ids that a real
    vocabulary uses for text; no input is ever split into them.
    """
    symbols = _byte_symbols()
    vocabulary = {symbol: token_id for token_id, symbol in enumerate(symbols.values())}
    merges = []
    for word in ROLES + WORDS:
        spelled = [symbols[byte] for byte in word.encode()]
        for length in range(2, len(spelled) + 1):
            beginning = "".join(spelled[:length])
            if beginning not in vocabulary:
                vocabulary[beginning] = len(vocabulary)
                merges.append((beginning[:-1], beginning[-1]))
    assert len(vocabulary) <= n_tokens, f"the words alone are {len(vocabulary)} tokens"
    space = symbols[ord(" ")]
    vocabulary |= {f"{space}w{i}": len(vocabulary) + i for i in range(n_tokens - len(vocabulary))}
    return vocabulary, merges


def write_tokenizer(folder: Path, first_special_id: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.json."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(*bpe(first_special_id)))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "extra_special_tokens": NAMED_TOKENS,
            "model_max_length": 32768,
            "pad_token": "<|endoftext|>",
            "processor_class": "Qwen2_5OmniProcessor",
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )
    write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})


def write_json(path: Path, value: object) -> None:
    """Write `value` as people read it, with the same bytes on every system."""
    path.write_bytes(json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")


def spoken_tokens() -> list[str]:
    """The words as the vocabulary spells them."""
    symbols = _byte_symbols()
    return ["".join(symbols[byte] for byte in word.encode()) for word in WORDS]


def _byte_symbols() -> dict[int, str]:
    """Byte -> the visible character that stands for it in byte-level BPE (GPT-2's alphabet), in order of id."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
