"""What decoding in pieces costs where neighbours matter: a small DiT, trained on made-up speech, by every way.

    python benchmarks/trained_speech.py [--train-steps 600] [--codes 240] [--json] [-o results/trained-speech.json]

Random weights hardly let a block hear the next one, so that approximations look better than they are. This trains the
published structure (22 layers, look-ahead in the 11th, blocks of 24 frames) in minutes to flow from noise to spectra
that depend on codes, a voice and a slow melody. Errors are of the mel, root mean square by its standard deviation,
against solving the whole utterance by Euler's rule; no voice of a person is in it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from harness import card_lines, make_card, write_result
from latency import AFTER_CODES, BEFORE_CODES, CHUNK_CODES, PARAMS, SEED, chunk_mels, euler, noise_of
from torch import Tensor, nn
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniDiTConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniToken2WavDiTModel
from transformers.utils import logging

from lowvram.token2wav.conditioning import Speaker, prepare
from lowvram.token2wav.dit import CachedDiT, StreamingDiT, WavefrontDiT
from lowvram.token2wav.ode import solver_stages, time_grid
from lowvram.token2wav.windows import LOOK_AHEAD_BLOCKS, MEL_FRAMES_PER_CODE, Chunks

CODES, VOICES, MELS, X_VECTOR = 64, 16, 80, 192
BATCH, BATCH_CODES = 8, 84
LEARNING_RATE, WARM_UP_STEPS = 8e-4, 60
UNCONDITIONED_EVERY = 6
"""Steps: as often the null branch is trained, which guidance needs."""

REPORTED_STEPS = 20


class MadeUpSpeech:
    """Utterances whose mel follows codes, a voice, and a slow melody that no code tells."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._bins = torch.linspace(0, 1, MELS)
        middles, widths, heights = (self._uniform(CODES, 3, 1) for _ in range(3))
        bumps = (1 + 2 * heights) * torch.exp(-(((self._bins - middles) / (0.03 + 0.08 * widths)) ** 2))
        self._spectra = bumps.sum(1) - 6 - 2 * self._bins
        self.mean_mel = self._spectra.mean(0)
        self._x_vectors = torch.randn(VOICES, X_VECTOR, generator=generator)
        self._timbres = 1.5 * _smooth(torch.randn(VOICES, MELS, generator=generator), reach=4)

    def some(self, utterances: int, codes: int) -> tuple[Tensor, Tensor, Speaker]:
        """Codes [B, n], mel [B, 2n, M] and voices, whose tensors have the first dimension B."""
        spoken = torch.stack([self._babble(codes) for _ in range(utterances)])
        voices = torch.randint(VOICES, (utterances,), generator=self._generator)
        mel = _smooth(self._spectra[spoken].repeat_interleave(MEL_FRAMES_PER_CODE, 1).mT, reach=12).mT
        noise = torch.randn(mel.shape, generator=self._generator)
        mel = mel + self._melody(utterances, mel.shape[1]) + self._timbres[voices, None] + 0.15 * noise
        return spoken, mel, self._heard(voices)

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self._generator)

    def _babble(self, codes: int) -> Tensor:
        """Each code for two to six places."""
        drawn = torch.randint(CODES, (codes,), generator=self._generator)
        held = torch.randint(2, 7, (codes,), generator=self._generator)
        return drawn.repeat_interleave(held)[:codes]

    def _melody(self, utterances: int, frames: int) -> Tensor:
        """A ripple over the bins that moves over tens of frames, at an unknown phase: [B, F, M]."""
        pitch = 9 + 8 * _smooth(torch.randn(utterances, frames, generator=self._generator), reach=80)
        phase = 2 * math.pi * self._uniform(utterances, 1, 1)
        return 0.6 * torch.cos(2 * math.pi * pitch[..., None] * self._bins + phase)

    def _heard(self, voices: Tensor) -> Speaker:
        babble = self._spectra[torch.randint(CODES, (len(voices), 30), generator=self._generator)]
        return Speaker(self._x_vectors[voices], (self._timbres[voices, None] + babble).repeat_interleave(3, 1))


def _smooth(x: Tensor, reach: int) -> Tensor:
    """A weighted mean over the last dimension, whose weights fall to a third within a third of `reach`."""
    weights = torch.exp(-torch.arange(-reach, reach + 1).abs() * 3 / reach)
    padded = F.pad(x.reshape(-1, 1, x.shape[-1]), (reach, reach), "replicate")
    return F.conv1d(padded, (weights / weights.sum()).view(1, 1, -1)).view(x.shape)


def untrained_dit(mean_mel: Tensor) -> Any:
    """The published structure, narrow, that says `mean_mel` [M] of everything."""
    torch.manual_seed(SEED)
    config = Qwen2_5OmniDiTConfig(
        hidden_size=96,
        num_attention_heads=6,
        head_dim=16,
        emb_dim=64,
        enc_emb_dim=X_VECTOR,
        enc_dim=32,
        enc_channels=[32, 32, 32, 32, 96],
        enc_attention_channels=16,
        enc_se_channels=16,
        dropout=0.0,
    )
    dit: Any = Qwen2_5OmniToken2WavDiTModel._from_config(config, attn_implementation="sdpa")
    for name, weight in dit.named_parameters():
        if name.endswith("bias") or "norm.linear" in name or "norm_out" in name or "proj_out" in name:
            nn.init.zeros_(weight)
        elif weight.ndim >= 2:
            nn.init.xavier_uniform_(weight)
    dit.proj_out.bias.data.copy_(mean_mel)
    return dit


def train(dit: Any, speech: MadeUpSpeech, steps: int, generator: torch.Generator) -> Iterator[float]:
    """Flow matching: on the straight line between noise and mel, the DiT learns its direction. Yields each loss."""
    optimizer = torch.optim.AdamW(dit.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARM_UP_STEPS) * 0.5 * (1.03 + math.cos(math.pi * step / steps))
    )
    dit.train()
    for step in range(steps):
        codes, mel, voices = speech.some(BATCH, BATCH_CODES)
        noise, times = torch.randn(mel.shape, generator=generator), torch.rand(BATCH, 1, 1, generator=generator)
        unconditioned = step % UNCONDITIONED_EVERY == 0
        direction = dit(
            hidden_states=noise + (mel - noise) * times,
            condition_vector=voices.ref_mel,
            speaker_embedding=voices.cond[:, None].expand(-1, mel.shape[1], -1),
            quantized_code=codes,
            time_step=times.flatten(),
            apply_cfg=False,
            drop_audio_conditioning=unconditioned,
            drop_code=unconditioned,
        )
        loss = F.mse_loss(direction, mel - noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(dit.parameters(), 1.0)
        optimizer.step()
        rate.step()
        yield loss.item()
    dit.eval()


@torch.no_grad()
def errors(dit: Any, codes: list[int], voice: Speaker) -> dict[str, float]:
    """Each way's error."""
    stages = solver_stages("euler", time_grid(PARAMS.steps))
    heard = prepare(dit, voice, stages, guidance=PARAMS.guidance)
    streams: dict[str, StreamingDiT] = {"exact": WavefrontDiT(dit, heard, seed=SEED)}
    for mode in LOOK_AHEAD_BLOCKS:
        streams[mode] = CachedDiT(dit, heard, seed=SEED, chunks=Chunks.of(mode, PARAMS.chunk_s))
    mels = {way: torch.cat((stream.push(codes), stream.finish()), -1) for way, stream in streams.items()}
    in_chunks = [mel for _, mel in chunk_mels(dit, codes, voice, PARAMS.steps)]
    mels[f"chunks {CHUNK_CODES}/{BEFORE_CODES}/{AFTER_CODES}"] = torch.cat(in_chunks, -1)
    whole = euler(dit, codes, noise_of(len(codes)), PARAMS.steps, voice)
    return {way: float((mel - whole).square().mean().sqrt() / whole.std()) for way, mel in mels.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, compare, print, and keep the result if asked; returns the exit code."""
    parser = argparse.ArgumentParser(description="The error of decoding in pieces, on a small trained DiT.")
    parser.add_argument("--train-steps", type=int, default=600, help="half a second or so each (default: 600)")
    parser.add_argument("--codes", type=int, default=240, help="length of the speech, 50 a second (default: 240)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("-o", "--output", type=Path, help="keep the JSON in this file, too")
    chosen = parser.parse_args(arguments)
    logging.set_verbosity_error()
    generator = torch.Generator().manual_seed(SEED)
    speech = MadeUpSpeech(generator)
    dit, losses = untrained_dit(speech.mean_mel), []
    for loss in train(dit, speech, chosen.train_steps, generator):
        losses.append(loss)
        if len(losses) % REPORTED_STEPS == 0:
            print(f"step {len(losses)}: loss {mean(losses[-REPORTED_STEPS:]):.3f}", file=sys.stderr)
    codes, _, voice = speech.some(1, chosen.codes)
    found = errors(dit, codes[0].tolist(), voice)
    card = make_card(
        "CPU",
        train_steps=chosen.train_steps,
        loss=f"{losses[0]:.2f} to {mean(losses[-REPORTED_STEPS:]):.2f}",
        codes=chosen.codes,
        steps=PARAMS.steps,
        guidance=PARAMS.guidance,
    )
    if chosen.output:
        write_result(chosen.output, {"card": card, "errors": found})
    lines = [*card_lines(card), "", *(f"{way:<20} {error:.1e}" for way, error in found.items())]
    print(json.dumps({"card": card, "errors": found}) if chosen.json else "\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
