"""A window around the model: choose a file, ask, read and hear the answer, and share the card with others meanwhile.

`python examples/desktop_app.py --model demo`. The model has a thread of its own (`model_thread.py`); here are the
widgets, which read its reports from a queue and call the runtime to stop, to name a budget, and to give the card away.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tkinter as tk
from collections.abc import Iterator, Sequence
from pathlib import Path
from tkinter import filedialog, scrolledtext, ttk
from typing import Any

from file_kinds import ENDINGS
from loudspeaker import Speech, places_for_speech
from model_thread import Closed, ModelThread, Opened, Report

from lowvram import (
    AudioChunk,
    Finished,
    LowVRAMError,
    OmniRuntime,
    Plan,
    Progress,
    SamplingParams,
    SpeechParams,
    TextDelta,
)

POLL_MS = 30
BUDGETS = ("auto", "4GiB", "6GiB", "8GiB", "10GiB", "12GiB", "16GiB")
GIB = 2**30


class Window:
    """The widgets, and what a person does with them. All of it runs in the window's own thread."""

    def __init__(self, root: tk.Tk, model: ModelThread, places: Iterator[Speech], vram: str = "auto") -> None:
        self._root, self._model, self._places = root, model, places
        self._omni: OmniRuntime | None = None
        self._speech = Speech()
        self._is_answering = False
        self._file: Path | None = None
        self._vram = vram
        self.file_name, self.question = tk.StringVar(root, "no file"), tk.StringVar(root, "What happens here?")
        self.budget, self.is_given_away = tk.StringVar(root, vram), tk.BooleanVar(root)
        self.status = tk.StringVar(root, "opening the model ...")
        self._build_question(ttk.Frame(root, padding=6))
        self._build_memory(ttk.Frame(root, padding=6))
        self.answer = scrolledtext.ScrolledText(root, wrap="word", state="disabled", height=20)
        self.answer.pack(fill="both", expand=True)
        ttk.Label(root, textvariable=self.status, padding=6).pack(fill="x")
        root.title("lowvram")
        root.protocol("WM_DELETE_WINDOW", self.close)
        self._enable()
        self._poll()

    def _build_question(self, row: ttk.Frame) -> None:
        ttk.Button(row, text="Choose a file", command=self.choose_file).pack(side="left")
        ttk.Label(row, textvariable=self.file_name).pack(side="left", padx=6)
        ttk.Entry(row, textvariable=self.question).pack(side="left", fill="x", expand=True)
        self.ask_button = ttk.Button(row, text="Ask", command=self.ask)
        self.stop_button = ttk.Button(row, text="Stop", command=self.stop)
        for widget in (self.ask_button, self.stop_button):
            widget.pack(side="left")
        row.pack(fill="x")

    def _build_memory(self, row: ttk.Frame) -> None:
        ttk.Label(row, text="VRAM").pack(side="left")
        self.budget_box = ttk.Combobox(row, textvariable=self.budget, values=BUDGETS, width=8)
        self.game_box = ttk.Checkbutton(
            row, text="give the card to a game", variable=self.is_given_away, command=self.share_card
        )
        for sign in ("<<ComboboxSelected>>", "<Return>"):
            self.budget_box.bind(sign, self.choose_budget)
        for widget in (self.budget_box, self.game_box):
            widget.pack(side="left", padx=6)
        row.pack(fill="x")

    def _enable(self) -> None:
        """What can be done now."""
        is_open, is_here = self._omni is not None, not self.is_given_away.get()
        for widget, is_enabled in (
            (self.ask_button, is_open and is_here and not self._is_answering),
            (self.stop_button, is_open and self._is_answering),
            (self.budget_box, is_open),
            (self.game_box, is_open),
        ):
            widget.state(["!disabled" if is_enabled else "disabled"])

    def choose_file(self) -> None:
        """Ask the person for one."""
        patterns = [f"*{ending}" for ending in ENDINGS]
        if chosen := filedialog.askopenfilename(filetypes=[("video, sound, picture", patterns), ("all files", "*")]):
            self.take_file(Path(chosen))

    def take_file(self, path: Path) -> None:
        """The file that the next questions are about."""
        self._file = path
        self.file_name.set(path.name)

    def ask(self) -> None:
        """Ask about the file, if there is one; what was still to be heard of the last answer is not."""
        content: list[dict[str, Any]] = [{"type": "file", "file": self._file}] if self._file else []
        self._silence()
        self._speech = next(self._places)
        self._is_answering = True
        self._model.ask([{"role": "user", "content": [*content, {"type": "text", "text": self.question.get()}]}])
        self._write(f"> {self.question.get()}\n")
        self._enable()

    def stop(self) -> None:
        """The answer ends at its next step; from now on nobody hears it."""
        assert self._omni
        self._omni.cancel()
        self._speech.hush()

    def choose_budget(self, _event: object = None) -> None:
        """From the next step on, in the middle of an answer, too; where that cannot be, all stays as it was."""
        assert self._omni
        try:
            self._omni.set_budget(self.budget.get())
        except LowVRAMError as error:
            self._write_error(error)
            self.budget.set(self._vram)
        else:
            self._vram = self.budget.get()
            self.status.set(f"budget {(self._omni.budget.vram_bytes or 0) / GIB:.2f} GiB")

    def share_card(self) -> None:
        """An answer in the making waits while the card is away, and goes on as if nothing had been."""
        assert self._omni
        is_away = self.is_given_away.get()
        (self._omni.release if is_away else self._omni.resume)()
        self.status.set("the card is free for others" if is_away else "the card is ours")
        self._enable()

    def close(self) -> None:
        """In the middle of an answer, too: the model's thread ends at its next step."""
        self._silence()
        self._model.close()
        self._root.destroy()

    def _poll(self) -> None:
        self._root.after(POLL_MS, self._poll)  # first: an error below must not be the last that the window shows
        while not self._model.reports.empty():
            self._show(self._model.reports.get())

    def _show(self, report: Report) -> None:
        match report:
            case Opened(omni=omni):
                self._omni = omni
                self.status.set(f"ready on {omni.device.title}, kernel {omni.kernel}")
                self._enable()
            case Plan(peak_bytes=peak_bytes):
                self._write(f"(planned peak: {peak_bytes / GIB:.2f} GiB)\n")
            case Progress():
                self.status.set(progress_line(report))
            case TextDelta(text=text):
                self._write(text)
            case AudioChunk():
                self._hear(report)
            case Finished(finish_reason=reason, audio_s=audio_s, timings=timings):
                self.status.set(
                    f"{reason} after {timings['total']:.1f} s, {audio_s:.1f} s of speech to {self._speech.where}"
                )
                self._end_answer()
            case LowVRAMError():
                self._write_error(report)
                self._end_answer()
            case Closed():
                self._omni = None
                self.status.set("the model is closed")
                self._end_answer()

    def _hear(self, chunk: AudioChunk) -> None:
        try:
            self._speech.take(chunk)
        except LowVRAMError as error:
            self._speech = Speech()  # the words go on
            self._write_error(error)

    def _end_answer(self) -> None:
        self._speech.end()
        self._is_answering = False
        self._write("\n")
        self._enable()

    def _silence(self) -> None:
        self._speech.hush()
        self._speech.end()

    def _write(self, text: str) -> None:
        self.answer.configure(state="normal")
        self.answer.insert("end", text)
        self.answer.configure(state="disabled")
        self.answer.see("end")

    def _write_error(self, error: LowVRAMError) -> None:
        self._write(f"\n{type(error).__name__}: {error.args[0]}\n{error.hint}\n")


def progress_line(progress: Progress) -> str:
    """What is being done and how far it is: "prefill: 120 of 768 tokens", "download: 1.50 of 9.60 GiB"."""
    amounts = [n for n in (progress.done, progress.total) if n is not None]
    if progress.unit == "bytes":
        return f"{progress.stage}: {' of '.join(f'{n / GIB:.2f}' for n in amounts)} GiB"
    return f"{progress.stage}: {' of '.join(map(str, amounts))} {progress.unit}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Open the window; it is there before the model is. Returns the exit code once it was closed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-Omni-7B-AWQ", help="hub id, folder or demo")
    parser.add_argument("--vram", default="auto", help="budget such as 8GiB; default: what is free")
    parser.add_argument("--max-tokens", type=int, default=512, help="the longest answer")
    options = parser.parse_args(arguments)
    try:
        root = tk.Tk()
    except tk.TclError as error:
        print(f"there is no display for a window: {error}", file=sys.stderr)
        return 1
    sampling, speech = SamplingParams(max_tokens=options.max_tokens), SpeechParams(mode="balanced")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Tk swallows the exception that Ctrl-C would be
    with ModelThread(options.model, options.vram, sampling=sampling, speech=speech) as model:
        Window(root, model, places_for_speech(Path()), options.vram)
        root.mainloop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
