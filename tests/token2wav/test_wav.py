"""The WAV file as another reader sees it at every moment, and raw samples in a pipe."""

import errno
import io

import numpy as np
import pytest
import soundfile

from lowvram.errors import LowVRAMError, OptionError
from lowvram.token2wav import wav
from lowvram.token2wav.wav import MAX_SAMPLES, WavWriter, pcm16, write_pcm


def tone(samples: int) -> np.ndarray:
    return np.sin(np.arange(samples) * 0.1).astype(np.float32) * 0.5


def test_the_file_is_valid_after_every_chunk(tmp_path) -> None:
    path = tmp_path / "reply.wav"
    with WavWriter(path) as writer:
        for end in (480, 960, 1441):
            writer.write(tone(end)[writer.samples :])
            heard, rate_hz = soundfile.read(path)
            assert (len(heard), rate_hz) == (end, 24_000)
            assert np.abs(heard - tone(end)).max() < 1 / 32768 + 1e-4


def test_its_format_is_mono_16_bit_pcm(tmp_path) -> None:
    with WavWriter(tmp_path / "reply.wav") as writer:
        writer.write(tone(480))
    about = soundfile.info(tmp_path / "reply.wav")
    assert (about.format, about.subtype, about.channels) == ("WAV", "PCM_16", 1)
    assert about.extra_info.count("should be") == 0


def test_no_sound_is_a_valid_file_of_0_frames(tmp_path) -> None:
    with WavWriter(tmp_path / "reply.wav"):
        pass
    assert soundfile.info(tmp_path / "reply.wav").frames == 0


def test_samples_without_their_header_are_left_out(tmp_path) -> None:
    path = tmp_path / "reply.wav"
    with WavWriter(path) as writer:
        writer.write(tone(480))
    with path.open("ab") as killed_before_the_header:
        killed_before_the_header.write(pcm16(tone(333)) + b"\x01")
    assert len(soundfile.read(path)[0]) == 480


def test_an_old_file_is_replaced(tmp_path) -> None:
    path = tmp_path / "reply.wav"
    path.write_bytes(b"old" * 1000)
    with WavWriter(path) as writer:
        writer.write(tone(10))
    assert path.stat().st_size == 44 + 20


def test_seconds_count_what_is_in_the_file(tmp_path) -> None:
    with WavWriter(tmp_path / "reply.wav") as writer:
        writer.write(tone(36_000))
        assert writer.seconds == 1.5


def test_samples_are_clipped_and_rounded() -> None:
    samples = np.array([-2, -1, -0.5 / 32767, 0, 0.6 / 32767, 1.5 / 32767, 1, 1.0001], dtype=np.float64)
    assert np.frombuffer(pcm16(samples), "<i2").tolist() == [-32767, -32767, 0, 0, 1, 2, 32767, 32767]


def test_a_missing_folder_is_named_before_any_work(tmp_path) -> None:
    with pytest.raises(OptionError, match=r"folder .*nowhere does not exist"):
        WavWriter(tmp_path / "nowhere" / "reply.wav")


def test_a_folder_is_not_a_file(tmp_path) -> None:
    with pytest.raises(OptionError, match="cannot write"):
        WavWriter(tmp_path)


def test_a_full_disk_keeps_what_was_written(tmp_path, monkeypatch) -> None:
    class FullDisk(io.FileIO):
        """Room for 1,500 bytes: takes what fits of a write, then refuses, as an operating system does."""

        def write(self, content) -> int:
            room = 1500 - self.tell()
            if room <= 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(bytes(content[:room]))

    monkeypatch.setattr(wav, "open", lambda path, mode, buffering: FullDisk(path, mode), raising=False)
    path = tmp_path / "reply.wav"
    with WavWriter(path) as writer:
        writer.write(tone(480))
        with pytest.raises(LowVRAMError, match=r"ends after 0\.02 s of speech: No space left"):
            writer.write(tone(480))
    assert len(soundfile.read(path)[0]) == 480


def test_the_end_of_the_format_is_an_error_and_not_a_broken_file(tmp_path) -> None:
    with WavWriter(tmp_path / "reply.wav") as writer:
        writer.samples = MAX_SAMPLES - 1
        with pytest.raises(LowVRAMError, match=r"24\.9 h"):
            writer.write(tone(2))


def test_raw_samples_reach_the_pipe_at_once() -> None:
    pipe = io.BytesIO()
    stdout = io.BufferedWriter(pipe)
    write_pcm(stdout, np.array([0.0, 1.0], dtype=np.float32))
    assert pipe.getvalue() == b"\x00\x00\xff\x7f"
