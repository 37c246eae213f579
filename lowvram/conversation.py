"""Arguments and lines that a person types -> messages to answer.

Media are opened as soon as they are named, so that a wrong name is refused before a model is opened, and stay open as
long as the conversation may come back to them.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .errors import MediaError, OptionError
from .listeners import write_text
from .options import Limits

ADD, QUIT = "/add", "/quit"

Part = Mapping[str, Any]

NO_NAME = (errno.ENOENT, errno.ENAMETOOLONG, errno.EINVAL)
"""How a system refuses words for a name: there is none such, it is too long, or on Windows it has a question mark."""


def read_arguments(
    sources: Sequence[str], prompt: str, system: str | None, limits: Limits, stack: ExitStack
) -> list[dict[str, Any]]:
    """The conversation that the arguments mean: media in order, each as what its content is, then the words."""
    if not sources and not prompt.strip():
        raise OptionError("nothing to answer: 0 media and no prompt", hint='try: lowvram run clip.mp4 -p "Who speaks?"')
    parts = [_named_part(source, limits, stack) for source in sources]
    if prompt:
        parts.append({"type": "text", "text": prompt})
    turns: list[dict[str, Any]] = [{"role": "user", "content": parts}]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def _named_part(source: str, limits: Limits, stack: ExitStack) -> dict[str, Any]:
    """`open_part`, for people who may have meant words to be asked and not a name."""
    try:
        return open_part(source, limits, stack)
    except MediaError as error:
        is_no_name = isinstance(error.__cause__, OSError) and error.__cause__.errno in NO_NAME
        if is_no_name and not Path(source).suffix[1:].isalnum():  # "Who is Dr. No?" has a suffix, too
            error.hint += "; words to be asked go after -p"
        raise


def open_part(source: str, limits: Limits, stack: ExitStack) -> dict[str, Any]:
    """A medium as a message part. A pipe or a download is read once, here, and kept until `stack` is left."""
    from .media import open_medium
    from .media.sources import open_stored

    stored = stack.enter_context(open_stored(source, limits))
    reader = stored.reader()
    reader.raw.name = stored.name  # type: ignore[attr-defined]  # how messages call it
    with open_medium(reader, limits) as medium:
        return {"type": medium.kind, medium.kind: reader}


class Chat:
    """What was said so far. `open_part` makes a message part of a medium's path or address."""

    def __init__(self, open_part: Callable[[str], Part], media: Sequence[str] = (), system: str | None = None) -> None:
        self._open_part = open_part
        self._said: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
        self._added = [open_part(source) for source in media]

    def take(self, line: str) -> list[dict[str, Any]] | None:
        """The messages to answer after this line, None if it is empty or a command.

        Raises OptionError for a command that there is not, MediaError for a medium that cannot be read.
        """
        command, _, rest = line.strip().partition(" ")
        if command == ADD and rest.strip():
            self._added.append(self._open_part(_path_typed(rest.strip())))
            return None
        if command.startswith("/"):
            raise OptionError(f"{line.strip()} is none of the 2 commands", hint=f"{ADD} FILE, {QUIT}")
        if not command:
            return None
        media, self._added = self._added, []
        return [*self._said, {"role": "user", "content": [*media, {"type": "text", "text": line.strip()}]}]

    def keep(self, messages: list[dict[str, Any]], reply: str) -> None:
        """Go on from what `take` gave and what was answered. A turn that failed is forgotten, its media too."""
        self._said = [*messages, {"role": "assistant", "content": reply}]


def _path_typed(words: str) -> str:
    """A path or an address as a shell would have passed it on, which here nobody did: out of its quotes, which a file
    dragged to a terminal comes in, and from the home folder."""
    if len(words) > 1 and words[0] == words[-1] and words[0] in "'\"":
        words = words[1:-1]
    return os.path.expanduser(words)


def typed_lines(first: str) -> Iterator[str]:
    """What a person types, after what was said on the command line, until they have enough."""
    if first:
        yield first
    while (line := _next_line()) and line.strip() != QUIT:
        yield line


def _next_line() -> str:
    """Empty at the end of stdin."""
    if sys.stdin is None:
        return ""
    if sys.stdin.isatty():
        write_text("> ", sys.stderr, end="")
    return sys.stdin.readline()


def text_to_speak(text: str) -> str:
    """What to read aloud, `-` being all of stdin."""
    if text != "-":
        return text
    if sys.stdin is None:
        raise OptionError("there is no stdin to read", hint="--speak TEXT")
    return sys.stdin.read().strip()
