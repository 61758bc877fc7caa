"""What submitit starts in a test: a job that takes two seconds to save when it is told to end."""

import signal
import time
from pathlib import Path
from types import FrameType


def job(folder: Path) -> None:
    """Leaves `started` at once, `begun` when it listens, `asked` when it is told, and `saved` when it has saved."""

    def save(number: int, frame: FrameType | None) -> None:
        (folder / "asked").touch()
        time.sleep(2)
        (folder / "saved").touch()
        raise SystemExit(143)

    (folder / "started").touch()
    time.sleep(1)
    signal.signal(signal.SIGTERM, save)
    (folder / "begun").touch()
    time.sleep(120)
