"""What two models are compared on where nobody gives anything else: a few texts, and a clip seen and heard.

Texts are chosen to differ: plain prose, another script, code, numbers and names, talk. They are read as they stand and
asked as messages; media are asked about.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from text_files import read_text

from lowvram.errors import LowVRAMError, OptionError
from lowvram.media import Kind, Medium, open_medium, open_video, read_sound
from lowvram.options import Limits

PromptKind = Literal["text", "picture", "sound", "video"]
KINDS: tuple[PromptKind, ...] = ("text", "picture", "sound", "video")

CLIP = Path(__file__).parent.parent / "examples" / "clip.mp4"

CALLED: Mapping[Kind, PromptKind] = {"image": "picture", "audio": "sound", "video": "video"}
QUESTIONS: Mapping[Kind, str] = {
    "image": "Describe this picture in detail.",
    "audio": "Describe what you hear in detail.",
    "video": "Describe what happens in this video, and what can be heard.",
}

TEXTS = (
    "A lighthouse keeper writes down the weather three times a day, and has done so for thirty years. Most entries say"
    " no more than wind and cloud. But on the ninth of March she added a line: the ice went out this morning, all at"
    " once, with a sound like a train, and by noon there were already two boats in the bay.",
    "清晨的市场里，卖豆腐的老人总是第一个到。他把木板架好，掀开白布，热气就升了起来。有人问他为什么不多睡一会儿，"
    "他笑着说：“豆腐不等人，人也不等豆腐。”",
    "def longest_run(values):\n    best = length = 0\n    previous = object()\n    for value in values:\n        length"
    " = length + 1 if value == previous else 1\n        best = max(best, length)\n        previous = value\n    return"
    " best\n\n\nassert longest_run([1, 1, 2, 2, 2, 3]) == 3",
    "The train leaves Bern at 06:34 and reaches Milan at 9:37, a distance of 346 km; a ticket bought by 14 April costs"
    " CHF 38.50, later ones 71. Dr. Okafor and Ms. Lindqvist have seats 41 and 42 in coach 7.",
    "How would you explain to a child of seven why the sky is blue but the sunset is red? Use an example from the"
    " kitchen, and no more than five sentences.",
    "Ich habe gestern vergessen, die Fenster zu schließen, und heute früh lag der halbe Balkon im Wohnzimmer. Können"
    " Sie mir sagen, wie man Erde aus einem hellen Teppich bekommt?",
)


@dataclass(frozen=True)
class Prompt:
    """Something to answer. `words` are a text's own, which is also read without any chat; None for media."""

    kind: PromptKind
    name: str
    messages: Sequence[Mapping[str, Any]]
    words: str | None = None


def text_prompts(path: Path | None = None) -> Iterator[Prompt]:
    """The built-in texts, or those of a file: its paragraphs, parted by empty lines. Raises OptionError without any."""
    texts = list(TEXTS) if path is None else _paragraphs(path)
    for number, words in enumerate(texts, start=1):
        yield Prompt("text", f"text {number}", [{"role": "user", "content": words}], words)


def media_prompts(folder: Path | None = None) -> Iterator[Prompt]:
    """The example clip (whole, a picture of it, its sound), or the media of a folder, each by what it is.

    Files that are no media are passed over. Raises OptionError for a folder without any.
    """
    if folder is None:
        yield from _of_clip(CLIP)
        return
    found = [prompt for path in sorted(folder.rglob("*")) if path.is_file() and (prompt := _of_file(path))]
    if not found:
        raise OptionError(f"{folder} has 0 pictures, sounds or videos", hint="leave --media out for the example clip")
    yield from found


def at_most(limit: int | None, prompts: Iterator[Prompt]) -> list[Prompt]:
    """The first prompts of each kind, in the order of `KINDS`."""
    ordered = sorted(prompts, key=lambda prompt: KINDS.index(prompt.kind))
    return [prompt for _, same in groupby(ordered, key=lambda prompt: prompt.kind) for prompt in list(same)[:limit]]


def _paragraphs(path: Path) -> list[str]:
    text = read_text(path, "a text in UTF-8")
    paragraphs = [
        "\n".join(lines) for filled, lines in groupby(text.splitlines(), key=lambda line: bool(line.strip())) if filled
    ]
    if not paragraphs:
        raise OptionError(f"{path} has 0 paragraphs", hint="texts parted by empty lines")
    return paragraphs


def _of_clip(clip: Path) -> Iterator[Prompt]:
    with open_medium(clip, Limits()) as medium:
        video = open_video(medium, Limits())
        (middle,) = video.frames([video.frame_count // 2])
        sound = read_sound(medium, None, None, Limits())
    yield _ask("video", f"{clip.name}", str(clip))
    yield _ask("image", f"a picture of {clip.name}", middle)
    yield _ask("audio", f"the sound of {clip.name}", sound)


def _of_file(path: Path) -> Prompt | None:
    try:
        medium: Medium = open_medium(path, Limits())
    except LowVRAMError:
        return None
    with medium:
        return _ask(medium.kind, path.name, str(path))


def _ask(kind: Kind, name: str, source: Any) -> Prompt:
    parts = [{"type": kind, kind: source}, {"type": "text", "text": QUESTIONS[kind]}]
    return Prompt(CALLED[kind], name, [{"role": "user", "content": parts}])
