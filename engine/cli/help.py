"""How typer formats ``--help``, made plainer: types and usage lines."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup


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


class Command(TyperCommand):
    """A command with a plain ``--help``."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _plain(super().get_params(ctx))

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [piece.replace("{", "").replace("}", "") for piece in super().collect_usage_pieces(ctx)]


class Group(TyperGroup):
    """A group of commands with a plain ``--help``."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _plain(super().get_params(ctx))
