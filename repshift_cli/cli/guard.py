"""What commands share around their work: options given twice or by variables, and several outputs."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from typing import Any

from typer.core import TyperCommand

from repshift_cli.cli import ui
from repshift_cli.errors import UsageError

variables: dict[str, str] = {}
"""The variable of the environment that gives an option of the command its value, by option."""

_TRUE = ("1", "true", "t", "yes", "y", "on")

_OWN_VARIABLE = "--data-dir"
"""Its variable REPSHIFT_DATA_DIR names a folder of datasets. It is no error where the option is not allowed."""


class Command(TyperCommand):
    """A command whose options have defaults from the environment.

    The variables are REPSHIFT_<COMMAND>_<OPTION> and, for all commands with this option, REPSHIFT_<OPTION>. An option
    that is given twice is refused: the parser would use the last one silently.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        command = ctx.command_path.removeprefix("repshift ").replace(" ", "-")
        for param in self.params:
            if param.param_type_name == "option" and _OWN_VARIABLE not in param.opts:
                _set_variables(param, command)
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for param in order:
            variables.pop(_long(param), None)
            is_switch = getattr(param, "is_flag", False) and not param.secondary_opts
            single = param.param_type_name == "option" and not (getattr(param, "multiple", False) or is_switch)
            if single and order.count(param) > 1 and not ctx.resilient_parsing:  # as when a shell completes
                raise UsageError(f"{param.opts[0]} is given more than once", "Give it once.")
        return super().parse_args(ctx, args)

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters. Help shows an argument by its name alone, without a Python type such as `<list[str]>`."""
        params: list[Any] = super().get_params(ctx)
        for param in params:
            if param.param_type_name == "argument":
                param.display_type_rich = lambda ctx: None
        return params


def _set_variables(param: Any, command: str) -> None:
    """Set the variables of an option."""
    option = _long(param)
    param.show_envvar = False
    param.envvar = [_variable(f"{command}{option[1:]}"), _variable(option[2:])]
    if found := [name for name in param.envvar if os.environ.get(name)]:
        variables[option] = found[0]


def _long(param: Any) -> str:
    return str(max(param.opts, key=len))


def _variable(name: str) -> str:
    return f"REPSHIFT_{name.replace('-', '_').upper()}"


def wants_json() -> bool:
    """Whether the command prints JSON, also if its options are not valid."""
    given = os.environ.get(variables.get("--json", ""), "")
    return "--json" in sys.argv or given.lower() in _TRUE


def origin(message: str) -> str | None:
    """The variables that give the options or values in a message of an error; None for none."""
    named = [
        f"{name}={os.environ[name]}"
        for option, name in variables.items()
        if re.search(rf"(?<![\w-]){option}(?![\w-])", message) or _is_named(os.environ[name], message)
    ]
    return f"The environment has {', '.join(named)}." if named else None


def _is_named(value: str, message: str) -> bool:
    """Whether a value, not a number, is in the message."""
    return re.search(r"[^\d.,+-]", value) is not None and value in message


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
