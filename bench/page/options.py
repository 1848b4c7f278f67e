"""Tables of options for READMEs, made of the code that reads them."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from engines.errors import ParameterError
from engines.runtimes import RUNTIMES
from runtime.call import markdown
from runtime.sampling.rules import RULES, UNKNOWN


def server() -> str:
    """The options of `python -m runtime.serve`."""
    from runtime.serve.__main__ import arguments

    lines = ["| option | default | meaning |", "|---|---|---|"]
    for action in arguments()._actions:
        if action.dest == "help":
            continue
        text = (action.help or "").replace("|", "\\|")
        # help texts end with the default, which has a column of its own here
        text = text.removesuffix(f"; default: {action.default}").removesuffix(f"; {action.default}")
        lines.append(f"| `{action.option_strings[0]}` | {_default(action)} | {text} |")
    return "\n".join(lines)


def runtimes() -> str:
    """The registry of runtimes, as device strings name them."""
    lines = ["| device string | runtime | types, the default first | module |", "|---|---|---|---|"]
    for runtime in RUNTIMES.values():
        kind = {"cuda": "cuda:0"}.get(runtime.device, runtime.device)
        name = kind if runtime.option == runtime.device else f"{kind}@{runtime.option}"
        said = "" if runtime.by_default else ", only when named"
        path = f"{runtime.module.replace('.', '/')}.py"
        lines.append(f"| `{name}` | {runtime.title}{said} | {', '.join(runtime.precisions)} | `{path}` |")
    return "\n".join(lines)


def schedulers() -> str:
    """The schedulers by name, with the values of the config's fields that they take."""
    lines = ["| name | diffusers' class | prediction | spacing |", "|---|---|---|---|"]
    for name, rule in RULES.items():
        fixed = "".join(f", `{key}={value}`" for key, value in rule.fixed.items())
        kinds, spacings = (", ".join(rule.allowed.get(key, ())) for key in ("prediction_type", "timestep_spacing"))
        lines.append(f"| `{name}` | `{rule.class_name}`{fixed} | {kinds} | {spacings} |")
    return "\n".join(lines)


def substitutes() -> str:
    """Diffusers' schedulers that have no rule, and what takes their place."""
    lines = ["| scheduler of the checkpoint | played as | why it has no rule |", "|---|---|---|"]
    for names, unknown in UNKNOWN.items():
        classes = ", ".join(f"`{name}`" for name in names.split() if name[0].isupper())
        instead = f"`{unknown.substitute}`, which {unknown.fits}" if unknown.substitute else "refused"
        lines.append(f"| {classes} | {instead} | {unknown.reason} |")
    return "\n".join(lines)


def _default(action: argparse.Action) -> str:
    if action.default in (None, [], ()):
        return ""
    if isinstance(action.default, float):
        return f"`{action.default:g}`"
    return f"`{getattr(action.default, 'name', action.default)}`"  # the name of a path, which is this machine's


TABLES: dict[str, Callable[[], str]] = {
    "python": markdown,
    "http": lambda: markdown(http=True),
    "server": server,
    "runtimes": runtimes,
    "schedulers": schedulers,
    "substitutes": substitutes,
}


def block(name: str) -> str:
    """The block of a README; ParameterError for an unknown name."""
    if name not in TABLES:
        raise ParameterError("options", f"no table of options is called {name}; there are {', '.join(TABLES)}")
    return f"<!-- options:{name} -->\n{TABLES[name]()}\n<!-- /options -->"
