"""Pictures of a report as a browser shows it, on a desk (1,400 pixels wide) and on a telephone (400), light and dark.

    python experiments/comparison/look.py outputs/multirun/SWEEP/report/report.html --output pictures

Needs Chromium (`apt-get install chromium`).
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

WIDTHS = {"desk": (1400, 5200), "telephone": (400, 12000)}


def look(page: Path, output: Path, chromium: str) -> None:
    """A PNG for each width, in light and dark."""
    output.mkdir(parents=True, exist_ok=True)
    for place, (width, height) in WIDTHS.items():
        for mode in ("light", "dark"):
            with tempfile.TemporaryDirectory() as folder:
                # Chromium's windows are at least 500 pixels wide; a frame can be as narrow as a telephone.
                frame = Path(folder) / "frame.html"
                frame.write_text(
                    f'<meta name=color-scheme content={mode}><body style="margin:0;color-scheme:{mode}"><iframe '
                    f'src="{page.resolve().as_uri()}" style="border:0;width:{width}px;height:{height}px"></iframe>'
                )
                options = [
                    "--headless",
                    "--no-sandbox",
                    "--hide-scrollbars",
                    f"--window-size={max(width, 500)},{height}",
                ]
                if mode == "dark":
                    options.append("--blink-settings=preferredColorScheme=0")
                picture = output / f"{place}_{mode}.png"
                command = [chromium, *options, f"--screenshot={picture.resolve()}", frame.as_uri()]
                subprocess.run(command, check=True, capture_output=True, timeout=120)
                print(picture)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="report.html")
    parser.add_argument("--output", type=Path, default=Path("pictures"), help="the folder of the pictures")
    parser.add_argument("--chromium", default="chromium", help="the browser's command")
    given = parser.parse_args()
    look(given.page, given.output, given.chromium)
