from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Annotated

import typer
from typer.testing import CliRunner

from lowvram.flag_groups import spread


@dataclass(frozen=True)
class Pair:
    left: Annotated[int, typer.Option("--left")] = 1
    right: Annotated[int, typer.Option("-r", "--right")] = 2


Lone = Annotated[bool, typer.Option("--lone")]


def test_a_command_of_groups_takes_every_flag_by_itself():
    taken: list[object] = []

    @spread
    def command(ctx: typer.Context, pair: Pair, lone: Lone = False) -> None:
        """What it does."""
        taken.extend((type(ctx).__name__, pair, lone))

    assert list(inspect.signature(command).parameters) == ["ctx", "left", "right", "lone"]
    app = typer.Typer()
    app.command()(command)
    assert "What it does." in CliRunner().invoke(app, ["--help"]).output
    assert CliRunner().invoke(app, ["-r", "5", "--lone"]).exit_code == 0
    assert taken == ["Context", Pair(1, 5), True]
