from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
from media_files import sine

from lowvram import sound_file
from lowvram.errors import BackendError, LowVRAMError, OptionError
from lowvram.sound_file import ENCODINGS, check_ending, open_sound_file

ALL = (".wav", *ENCODINGS)


def write(path: Path, *chunks: np.ndarray) -> Path:
    writer = open_sound_file(path)
    for chunk in chunks:
        writer.write(chunk)
    writer.close()
    return path


@pytest.mark.parametrize("name", ["reply", *(f"reply{ending}" for ending in ALL), "REPLY.WAV", "Reply.Flac"])
def test_every_kind_may_have_its_ending_in_capitals_and_wav_none(name: str):
    check_ending(Path(name))


def test_an_unknown_ending_is_refused_with_the_known_ones():
    with pytest.raises(
        OptionError, match=r"talk\.aac ends in \.aac, .* 4 kinds .* \(one of: \.wav, \.flac, \.ogg, \.mp3"
    ):
        check_ending(Path("talk.aac"))


def test_what_this_libsndfile_lacks_is_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sound_file.ENCODINGS, ".mp3", ("FLAC", "VORBIS"))
    with pytest.raises(BackendError, match=r"reply\.mp3 cannot be written by libsndfile [\d.]+: Invalid combination"):
        check_ending(Path("reply.mp3"))


def test_flac_holds_the_very_samples_of_the_wav_file(tmp_path: Path):
    sound = sine(24_000, 1.0).astype(np.float32) * 1.5  # clipped by both
    wav, flac = (soundfile.read(write(tmp_path / name, sound), dtype="int16")[0] for name in ("a.wav", "a.flac"))
    assert np.array_equal(wav, flac)


@pytest.mark.parametrize("ending", [".ogg", ".mp3"])
def test_a_lossy_file_sounds_like_what_was_written_chunk_by_chunk(tmp_path: Path, ending: str):
    sound = sine(24_000, 2.0).astype(np.float32) / 2
    read, rate_hz = soundfile.read(write(tmp_path / f"a{ending}", sound[:9000], sound[9000:]), dtype="float32")
    assert (rate_hz, len(read)) == (24_000, len(sound))
    assert np.sqrt(np.mean((read - sound)[2400:-2400] ** 2)) < 0.02


@pytest.mark.parametrize("ending", ENCODINGS)
def test_a_file_without_sound_can_be_read(tmp_path: Path, ending: str):
    assert soundfile.info(write(tmp_path / f"a{ending}")).frames == 480


@pytest.mark.parametrize("ending", ENCODINGS)
def test_a_full_disk_is_named_with_how_much_was_written(tmp_path: Path, ending: str):
    (tmp_path / f"a{ending}").symlink_to("/dev/full")
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 24_000).astype(np.float32)
    with pytest.raises(LowVRAMError, match=rf"a\{ending} cannot be written on after \d+\.00 s"):
        write(tmp_path / f"a{ending}", *[noise] * 20)
