"""Pictures of a report as readers see it, and how long it takes to open.

    python scripts/report_shots.py runs/quickstart/report/index.html FOLDER

Writes desktop and phone, light and dark, and what is printed (a PDF).
"""

import sys
from pathlib import Path

from chromium import Chromium

SIZES = {"desktop": (1280, 1), "phone": (390, 2)}


def main(report: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    address = report.absolute().as_uri()
    with Chromium() as browser:
        for name, (width, scale) in SIZES.items():
            for theme in ("light", "dark"):
                page = browser.open(address, width=width, dark=theme == "dark", scale=scale)
                if theme == "light":
                    took = page.script("performance.getEntriesByType('navigation')[0].loadEventEnd")
                    print(f"{name}: opened in {took:.0f} ms")
                height = page.script("document.documentElement.scrollHeight")
                page.size(width, height, scale)
                page.picture(folder / f"{name}-{theme}.png")
                if name == "desktop" and theme == "light":
                    page.pdf(folder / "print.pdf")
                page.close()
    print(f"{report.stat().st_size / 1e3:.0f} kB; pictures are in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
