from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import av
import pytest
from media_files import numbered_frame, sine, write_sound, write_video

from lowvram.errors import MediaError
from lowvram.media.containers import check_decoder, decode, find_track, open_container
from lowvram.media.sources import open_stored
from lowvram.options import Limits

LIMITS = Limits()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("containers") / "clip.mp4"
    frames = [numbered_frame(number) for number in range(30)]
    return write_video(path, frames, sound=sine(48_000, 1.2), muxing={"movflags": "+faststart"}).read_bytes()


@pytest.mark.parametrize(
    "playlist", ["ffconcat version 1.0\nfile {}\n", "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n"]
)
@pytest.mark.parametrize("suffix", [".m3u8", ".mp4"])
def test_a_playlist_opens_no_other_file(
    playlist: str, suffix: str, tmp_path: Path, clip: bytes, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("secret.mp4").write_bytes(clip)
    Path("list" + suffix).write_text(playlist.format("secret.mp4"), encoding="utf-8")
    with (
        open_stored("list" + suffix, LIMITS) as stored,
        pytest.raises(MediaError, match="not a medium"),
        open_container(stored),
    ):
        pass


@pytest.mark.parametrize("content", [b"once upon a time " * 100, b"\0" * 5000, bytes(range(256)) * 64])
def test_what_is_no_medium_is_refused_with_its_size(content: bytes):
    with (
        open_stored(content, LIMITS) as stored,
        pytest.raises(MediaError, match=rf"{len(content):,} bytes, is not a medium that can be read \(give a picture,"),
        open_container(stored),
    ):
        pass


def test_an_mp4_without_its_index_says_that_it_was_cut_short(tmp_path: Path):
    whole = write_video(tmp_path / "clip.mp4", [numbered_frame(1)] * 9).read_bytes()
    with (
        open_stored(whole[: whole.index(b"moov") - 4], LIMITS) as stored,
        pytest.raises(MediaError, match="without its index was cut short"),
        open_container(stored),
    ):
        pass


def test_tags_in_any_encoding_are_no_obstacle(tmp_path: Path):
    content = write_sound(tmp_path / "tone.wav", sine(8000)[None], 8000, "pcm_s16le").read_bytes()
    tag = b"LIST\x10\0\0\0INFOINAM\x04\0\0\0K\xf6ln"
    with open_stored(content[:36] + tag + content[36:], LIMITS) as stored, open_container(stored) as container:
        assert find_track(container, "audio") is not None


def test_a_cover_is_not_a_video(tmp_path: Path):
    png = bytes.fromhex(
        "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c4944415408d763f8cfc0000003010100"
        "c9fe92ef0000000049454e44ae426082"
    )
    picture = b"\0image/png\0\x03\0" + png
    cover = b"APIC" + len(picture).to_bytes(4, "big") + b"\0\0" + picture
    tag = b"ID3\x03\0\0" + bytes([0, 0, len(cover) >> 7, len(cover) & 127]) + cover
    song = write_sound(tmp_path / "song.mp3", sine(44_100)[None], 44_100, "libmp3lame").read_bytes()
    with open_stored(tag + song[song.index(b"\xff\xfb") :], LIMITS) as stored, open_container(stored) as container:
        assert len(container.streams.video) == 1
        assert find_track(container, "video") is None
        assert find_track(container, "audio") is not None


def test_a_track_without_a_decoder_is_refused(tmp_path: Path):
    frames = [numbered_frame(number) for number in range(9)]
    content = write_video(tmp_path / "clip.mp4", frames, sound=sine(48_000), sound_codec="alac").read_bytes()
    with open_stored(content.replace(b"alac", b"zzzz"), LIMITS) as stored, open_container(stored) as container:
        check_decoder(find_track(container, "video"), stored.name)
        with pytest.raises(MediaError, match=r"the audio of .* no decoder"):
            check_decoder(find_track(container, "audio"), stored.name)


def test_a_torn_file_gives_the_frames_it_has(clip: bytes):
    with open_stored(clip[: len(clip) * 2 // 3], LIMITS) as stored, open_container(stored) as container:
        assert 0 < len(list(decode(container, find_track(container, "video")))) < 30


@pytest.mark.parametrize("error", [av.error.InvalidDataError(1, "torn"), IndexError("a late track")])
def test_a_track_that_cannot_be_read_on_ends_with_the_frames_the_decoder_holds(error: Exception, clip: bytes):
    class Torn:
        def demux(self, track: av.VideoStream) -> Iterator[av.Packet]:
            yield from [packet for packet in container.demux(track) if packet.size][:20]
            raise error

    with open_stored(clip, LIMITS) as stored, open_container(stored) as container:
        assert len(list(decode(Torn(), find_track(container, "video")))) == 20


def test_damage_in_the_middle_costs_the_frames_it_hit(clip: bytes):
    middle = (clip.index(b"mdat") + len(clip)) // 2
    damaged = clip[:middle] + b"\xff" * 100 + clip[middle + 100 :]
    with open_stored(damaged, LIMITS) as stored, open_container(stored) as container:
        assert len(list(decode(container, find_track(container, "audio")))) > 30


def test_a_disk_that_fails_is_not_taken_for_the_end(tmp_path: Path):
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if size and self.tell() > 500_000:
                raise OSError(5, "Input/output error")
            return super().read(size)

    content = write_sound(tmp_path / "tone.wav", sine(48_000, 10)[None], 48_000, "pcm_s16le").read_bytes()
    with (
        open_stored(Failing(content), LIMITS) as stored,
        open_container(stored) as container,
        pytest.raises(MediaError, match="Input/output error"),
    ):
        list(decode(container, find_track(container, "audio")))
