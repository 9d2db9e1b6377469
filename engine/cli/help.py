"""typer's commands with a plainer ``--help``, and whose errors typer does not take for something else."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup

from flowreel.engine.cli import PastTyper


def _plain(parameters: list[Any]) -> list[Any]:
    """Simplifies the types shown: no ``<bool>`` for a flag, and ``<str>`` for the ``<list[str]>`` of a repeatable one.

    typer lets a metavar replace the type of options only, so the method that it calls for the type is replaced.
    """
    for parameter in parameters:
        kind = getattr(parameter, "display_type", None)
        if kind is not None:
            parameter.display_type_rich = lambda ctx, parameter=parameter: _words(parameter, ctx)
    return parameters


def _words(parameter: Any, context: Any) -> str | None:
    if getattr(parameter, "is_flag", False):
        return None
    words: str = parameter.display_type(context)
    return words.replace("<list[", "<").replace("]>", ">")


def _reflowed(text: str) -> str:
    """Each paragraph in one line, except those marked by click's \\b: lists and examples."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(part if part.startswith("\b") else part.replace("\n", " ") for part in paragraphs)


class Command(TyperCommand):
    """A command with a plain ``--help``, also shown where arguments are needed and none are given.

    Of its errors typer sees none that it would take for something else: see ``PastTyper``.
    """

    def __init__(self, *args: Any, help: str | None = None, **options: Any) -> None:
        # typer keeps the line breaks of a docstring: in a narrower terminal every other line would be a short one.
        super().__init__(*args, help=help and _reflowed(help), **options)
        self.no_args_is_help = any(parameter.required for parameter in self.params)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (EOFError, KeyboardInterrupt) as error:
            raise PastTyper from error

    def get_params(self, ctx: Any) -> list[Any]:
        return _plain(super().get_params(ctx))

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [piece.replace("{", "").replace("}", "") for piece in super().collect_usage_pieces(ctx)]


class Group(TyperGroup):
    """A group of commands with a plain ``--help``."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _plain(super().get_params(ctx))
