"""The command line, `firstorder COMMAND`.

A command's module is imported when the command is called, so that `firstorder --help` costs no import of torch and
each command needs only the packages that it uses.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

COMMANDS = {
    "attacks": "List what is registered: attacks, update rules, gradient methods; show one of them.",
    "demo": "Attack the packaged MNIST and CIFAR-10 models with every bounded attack at equal budgets.",
    "evaluate": "Evaluate models against attacks, resumably, on one machine or on a cluster.",
    "report": "Write the report of a run: a page that opens from disk, its text, and its figures; or compare runs.",
    "export": "Write a run as CSV, LaTeX, Markdown, JSON, BibTeX, or RobustBench's model_info.",
    "figure": "Write a figure of a run for a paper, as PDF, SVG or PNG, at the width of its column.",
    "diagnose": "Can a model's robust accuracy be trusted? Checks of its outputs, its gradients and the attack.",
    "leaderboard": "Rank models by robust accuracy in RobustBench's columns.",
    "curve": "Robust accuracy at every radius, from minimum-norm attacks.",
    "transfer": "Do adversarial examples of one model fool others? Success by source, target and attack.",
    "train": "Train a network adversarially, resumably.",
    "train-report": "Compare training runs: a page with learning curves, norms and loss surfaces.",
    "train-study": "Run a training configuration in several variants and seeds, and compare them.",
    "bench": "Compare the speed of attacks with other packages.",
    "train-cost": "Time and memory of an epoch, against the plain step.",
    "reproduce": "Check the package against its papers, table by table and figure by figure.",
    "scale-invariance": "A model's loss against the scale of its input.",
}
"""What each command does, in the order of use. The command `a-b` is `a_b` in the module `commands.a_b`."""


class _Later(TyperCommand):
    """A command that is imported when it is called."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        return self.loaded().make_context(info_name, args, parent, **extra)

    def loaded(self) -> Any:
        """The command itself."""
        assert self.name is not None
        word = self.name.replace("-", "_")
        made = getattr(import_module(f"firstorder.evaluation.commands.{word}"), word)
        if not isinstance(made, typer.Typer):
            function, made = made, typer.Typer(add_completion=False)
            made.command(self.name)(function)
        command = typer.main.get_command(made)
        command.name = self.name
        return command


class _Commands(TyperGroup):
    """The commands by name."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> TyperCommand | None:
        return _Later(cmd_name, help=COMMANDS[cmd_name]) if cmd_name in COMMANDS else None


app = typer.Typer(
    cls=_Commands,
    help="Sharper first-order adversarial attacks: list them, see them at work, evaluate and train models.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"firstorder {version('firstorder-attacks')}")
        raise typer.Exit


@app.callback()
def main(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show informational messages.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Set up logging for all commands."""
    from rich.console import Console
    from rich.logging import RichHandler

    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_time=False, show_path=False)],
    )
