"""Console command ``parallel-r1``. Each command imports what it needs when it runs, so that ``--help`` is fast."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def root() -> None:
    """Parallel-R1: train language models to think in parallel."""


@app.command()
def doctor(
    quick: Annotated[bool, typer.Option("--quick", help="Leave out the checks that start Ray and vLLM.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of lines.")] = False,
) -> None:
    """Check this environment; exits with 1 if a check fails, and says what to do about it."""
    from parallel_r1.doctor import report, run_checks

    raise typer.Exit(report(run_checks(quick), as_json))


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
