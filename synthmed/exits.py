"""From what a command raises to one or two lines and the contract's exit code."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
import typer.exceptions

from synthmed.errors import SynthmedError

INTERRUPTED = "interrupted; the same command goes on from what is complete"
NO_MEMORY = "error: out of memory\n  Lower data.grid or train.batch_patients."


def guarded(call: Callable[[], Any]) -> int:
    """Run `call` and translate what it raises into an exit code, printing one or two lines."""
    import errno

    try:
        result = call()
    except SynthmedError as error:
        typer.echo(f"error: {error}", err=True)
        return error.exit_code
    except typer.Exit as error:
        return error.exit_code
    except typer.exceptions.TyperException as error:
        if said := error.format_message():  # without a command there is the help alone
            typer.echo(f"error: {said}\n  See `synthmed --help`.", err=True)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        typer.echo(INTERRUPTED, err=True)
        return 130
    except MemoryError:
        typer.echo(NO_MEMORY, err=True)
        return 5
    except (BrokenPipeError, SystemExit) as error:
        # `synthmed list | head`: the reader has what it wanted; typer exits by itself then
        if not isinstance(error, BrokenPipeError) and not isinstance(
            error.__context__, BrokenPipeError
        ):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            too_large = error.errno == errno.EFBIG
            what = "a file may not grow that large" if too_large else "the disk is full"
            typer.echo(f"error: {what}\n  Free some space; the same command goes on.", err=True)
            return 5
        # no file name: it may be a patient's
        typer.echo(f"error: {error.strerror or type(error).__name__}", err=True)
        return 5
    except Exception as error:  # the last resort: a traceback would show the user's data
        if type(error).__name__ == "OutOfMemoryError":
            typer.echo(
                "error: the device is out of memory\n"
                "  Lower train.batch_patients or data.grid, or use --device cpu.",
                err=True,
            )
            return 5
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error):  # of torch
            typer.echo(NO_MEMORY, err=True)
            return 5
        at = frames(error)[-1] if frames(error) else "?"
        typer.echo(
            f"internal error: {type(error).__name__} at {at}\n"
            "  A defect of synthmed; details without data are in the run's log.jsonl.",
            err=True,
        )
        return 1
    if result == 130:  # typer has turned the signal into its exit code
        typer.echo(INTERRUPTED, err=True)
    return result if isinstance(result, int) else 0


def speakable() -> None:
    """Let nothing that is printed end a command: closed streams, letters that they cannot take."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def frames(error: BaseException) -> list[str]:
    """Where an error arose, without its message: that may quote a path or a header."""
    import traceback

    return [
        f"{Path(f.filename).name}:{f.lineno} {f.name}"
        for f in traceback.extract_tb(error.__traceback__)
    ]
