"""A folder of clips -> one JSON line each, by one runtime that stays open.

`python examples/batch.py clips/ -p "What happens here?" --model demo` writes `clips/answers.jsonl`. A clip that cannot
be read, or that does not fit the budget, gets a line with the error and its way out. Started again, after Ctrl-C too,
it skips the clips whose line is there; delete a line to have its clip answered again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TextIO

from file_kinds import ENDINGS

from lowvram import Finished, LowVRAMError, OmniRuntime, SamplingParams

MEMORY, MEDIA = 4, 5
"""Exit codes of the errors that are about one clip. Any other would meet the next clip, too, and ends the run."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer what has no line yet; returns the exit code."""
    options = parse(arguments)
    output = options.output or options.folder / "answers.jsonl"
    clips: list[Path] = []
    done = 0
    try:
        clips = clips_without_line(options.folder, output)
        with OmniRuntime.open(options.model, vram=options.vram) as omni, added_to(output) as lines:
            for record in answers(omni, clips, options.prompt, SamplingParams(max_tokens=options.max_tokens)):
                print(json.dumps(record, ensure_ascii=False), file=lines, flush=True)
                done += 1
                print(f"{done} of {len(clips)}: {record['clip']}: {record.get('error', 'ok')}", file=sys.stderr)
    except LowVRAMError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except OSError as error:  # of the folder or the lines: what becomes of a clip is in its line
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"stopped after {done} of {len(clips)} clips; start again to go on", file=sys.stderr)
        return 130
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="videos, sounds and pictures; folders in it are left alone")
    parser.add_argument("-p", "--prompt", default="Describe what you see and hear.")
    parser.add_argument("-o", "--output", type=Path, help="default: answers.jsonl in the folder")
    parser.add_argument("--model", default="Qwen/Qwen2.5-Omni-7B-AWQ", help="hub id, folder or demo")
    parser.add_argument("--vram", help="budget such as 8GiB; default: what is free")
    parser.add_argument("--max-tokens", type=int, default=256, help="the longest answer")
    options = parser.parse_args(arguments)
    if not options.folder.is_dir():
        parser.error(f"{options.folder} is not a folder")
    return options


def clips_without_line(folder: Path, output: Path) -> list[Path]:
    """The folder's media by name, without those that were answered already."""
    answered = set(clips_with_line(output)) if output.exists() else set()
    clips = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in ENDINGS)
    return [clip for clip in clips if clip.name not in answered]


def clips_with_line(output: Path) -> Iterator[str]:
    """Names in the file. Raises LowVRAMError at a line that is not ours, so that no other file is ever added to."""
    for number, line in enumerate(output.read_bytes().splitlines(keepends=True), start=1):
        try:
            if not line.endswith(b"\n"):
                raise ValueError("it has no end")
            yield json.loads(line)["clip"]
        except (ValueError, KeyError, TypeError) as error:
            raise LowVRAMError(
                f"line {number} of {output} is not an answer: {error}", hint="delete the line, or name another file"
            ) from error


def added_to(output: Path) -> TextIO:
    """The file, to write more lines. A clip's name that is no UTF-8 is written so that `json.loads` gives it back."""
    return output.open("a", encoding="utf-8", errors="surrogatepass")


def answers(
    omni: OmniRuntime, clips: Iterable[Path], prompt: str, sampling: SamplingParams
) -> Iterator[dict[str, Any]]:
    """A record for each clip: its answer, or why there is none."""
    for clip in clips:
        try:
            yield {"clip": clip.name, **answer(omni, clip, prompt, sampling)}
        except LowVRAMError as error:
            if error.exit_code not in (MEMORY, MEDIA):
                raise
            yield {"clip": clip.name, "error": type(error).__name__, "message": error.args[0], "hint": error.hint}


def answer(omni: OmniRuntime, clip: Path, prompt: str, sampling: SamplingParams) -> dict[str, Any]:
    """One clip's answer in text, and what it took. Raises what `generate` does."""
    messages = [{"role": "user", "content": [{"type": "file", "file": clip}, {"type": "text", "text": prompt}]}]
    with closing(omni.generate(messages, sampling=sampling, speech=None)) as events:
        *_, finished = events
    assert isinstance(finished, Finished)
    return {
        "text": finished.text,
        "finish_reason": finished.finish_reason,
        "prompt_tokens": finished.prompt_tokens,
        "text_tokens": len(finished.text_ids),
        "seconds": round(finished.timings["total"], 3),
    }


if __name__ == "__main__":
    sys.exit(main())
