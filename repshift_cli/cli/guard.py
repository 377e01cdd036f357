"""What commands share around their work: options that are given twice, failed checks in JSON, several outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from typer.core import TyperCommand

from repshift_cli.cli import ui
from repshift_cli.errors import CheckFailed, UsageError


class Command(TyperCommand):
    """A command that refuses an option that is given twice: the parser would use the last one silently."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for param in order:
            is_switch = getattr(param, "is_flag", False) and not param.secondary_opts
            single = param.param_type_name == "option" and not (getattr(param, "multiple", False) or is_switch)
            if single and order.count(param) > 1:
                raise UsageError(f"{param.opts[0]} is given more than once", "Give it once.")
        return super().parse_args(ctx, args)


@contextmanager
def failure_as_json(json: bool, document: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Print a failed check as JSON, with what is known of the result, before the command ends with its exit code."""
    try:
        yield
    except CheckFailed as failed:
        if json:
            reason = {"message": failed.message, "hint": failed.hint}
            ui.print_json({**(document or {}), **failed.document, "failed": reason})
        raise


def run_all(*steps: Callable[[], object]) -> None:
    """Run all steps, also after one fails; the first error is raised at the end, the others are warnings."""
    errors: list[Exception] = []
    for step in steps:
        try:
            step()
        except Exception as error:
            errors.append(error)
    for other in errors[1:]:
        ui.warn(str(other))
    if errors:
        raise errors[0]
