"""The terminal of a run, and the file in its folder that keeps what was on it."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.control import Control
from rich.text import Text

from selfdistill.text import escaped

LOG = "log.txt"
# Of a warning on the terminal, and of one in the log.
SHOWN_CHARACTERS, KEPT_CHARACTERS = 200, 2_000
# What is true of every resumed run and worries without need: tied weights are saved once, and the file system's clock.
HARMLESS = ("missing keys in the checkpoint model loaded: ['lm_head.weight']", "mtime may not be reliable")
# Libraries that print through handlers of their own.
TALKATIVE = ("transformers", "huggingface_hub", "datasets", "accelerate", "peft", "trl")


class Screen(Console):
    """The console of the program, which can keep what it prints: no emoji codes, no guessed highlights.

    There are no colours and no escape codes where there is no terminal, nor in the log.
    """

    _kept: IO[str] | None = None
    blocks = 0  # how often something was printed that breaks a table of lines

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, emoji=False, **options)

    def keep(self, path: Path) -> None:
        """From now on append what is printed to this file. A file that cannot be written ends no run."""
        with suppress(OSError):
            self._kept = path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
            self._copy = Console(file=self._kept, width=self.width, highlight=False, emoji=False, no_color=True)

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*objects, **options)
        if objects and all(isinstance(item, Control) for item in objects):
            return  # a bar or a spinner moves
        self.blocks += 1
        if self._kept is not None:
            with suppress(OSError):
                self._copy.print(*objects, **options)

    def print_line(self, text: str, style: str = "") -> None:
        """Print one line as it is, however narrow the terminal: a row of a table, or what stands between two rows."""
        self.print(Text(text, style=style), no_wrap=True, overflow="ignore", crop=False)
        self.blocks -= 1

    def note(self, text: str) -> None:
        """A line for the log alone."""
        if self._kept is not None:
            with suppress(OSError):
                self._kept.write(f"{escaped(_cut(text, KEPT_CHARACTERS))}\n")

    def close(self) -> None:
        """Close the log; nothing is lost without it."""
        if self._kept is not None:
            with suppress(OSError):
                self._kept.close()
            self._kept = None


class _Once:
    """Whether something is said for the first time, by the place in the code that says it."""

    def __init__(self) -> None:
        self._places: set[tuple[str, int]] = set()

    def __call__(self, file: str, line: int) -> bool:
        first = (file, line) not in self._places
        self._places.add((file, line))
        return first


class _Heard(logging.Handler):
    """What libraries log: every time into the log, and the first time from each place on the terminal, in one line."""

    def __init__(self, screen: Screen, once: _Once) -> None:
        super().__init__(logging.WARNING)
        self.screen, self.once = screen, once

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = f"{record.name}: {record.getMessage()}"
        except (TypeError, ValueError):  # arguments that do not fit the message
            message = f"{record.name}: {record.msg}"
        self.screen.note(f"{record.levelname.lower()}: {message}")
        harmless = any(said in message for said in HARMLESS)
        if not harmless and self.once(record.pathname, record.lineno):
            print(_line(message), file=sys.stderr)


@contextmanager
def heard(screen: Screen) -> Iterator[None]:
    """While the context lasts, warnings and what libraries log take one line each, once; the log has all of them.

    Deprecations inside of libraries stand in the log alone: the person at the terminal cannot mend them.
    """
    once, before = _Once(), warnings.formatwarning
    handler = _Heard(screen, once)
    own = [logger for logger in map(logging.getLogger, TALKATIVE) if not logger.propagate and logger.handlers]
    replaced = [(logger, logger.handlers[:]) for logger in own]

    def one_line(message: Any, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
        screen.note(f"{filename}:{lineno}: {category.__name__}: {message}")
        said = once(filename, lineno) and not issubclass(category, FutureWarning | DeprecationWarning)
        return f"{_line(str(message))}\n" if said else ""

    warnings.formatwarning = one_line  # type: ignore[assignment]
    for logger in own:
        logger.handlers = [handler]
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        warnings.formatwarning = before
        root.removeHandler(handler)
        for logger, handlers in replaced:
            logger.handlers = handlers


def _line(message: str) -> str:
    return f"warning: {escaped(_cut(' '.join(message.split()), SHOWN_CHARACTERS))}"


def _cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else f"{text[: characters - 3]}..."
