"""Options from a TOML file."""

import tomllib
from pathlib import Path
from typing import Any

import typer


def take_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make the options in a file the defaults of the command; those on the command line come first."""
    if path is not None and not context.resilient_parsing:
        try:
            context.default_map = _options(path, context.command.params)
        except ValueError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
    return path


def _options(path: Path, parameters: Any) -> dict[str, Any]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config {path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # of TOML, or of UTF-8
        raise ValueError(f"--config {path} is not TOML: {error}") from error
    accepted = {parameter.name: parameter for parameter in parameters if parameter.name not in ("config", "help")}
    found: dict[str, Any] = {}
    for word, value in content.items():
        name = word.replace("-", "_")
        if name not in accepted:
            options = ", ".join(option.replace("_", "-") for option in accepted)
            raise ValueError(f"--config {path}: the command has no option {word!r}; it has {options}")
        if name in found:
            raise ValueError(f"--config {path} has {name.replace('_', '-')!r} twice, with - and with _; keep one")
        found[name] = _value(path, word, value, accepted[name])
    return found


def _value(path: Path, word: str, value: Any, parameter: Any) -> Any:
    """A value as the command line would give it."""
    several, flag = getattr(parameter, "multiple", False), getattr(parameter, "is_flag", False)
    if several and isinstance(value, dict):  # [likelihood] rna = "nb"
        value = [f"{name}={each}" for name, each in value.items()]
    elif several and isinstance(value, str):
        value = [value]
    right = (
        isinstance(value, bool)
        if flag
        else isinstance(value, list) and all(isinstance(each, str) for each in value)
        if several
        else isinstance(value, str | int | float) and not isinstance(value, bool)
    )
    if not right:
        accepted = "true or false" if flag else "text or a list of texts" if several else "text or a number"
        raise ValueError(f"--config {path}: {word} must be {accepted}; found {value!r}")
    return value if flag or several else str(value)
