"""Writes the pages of docs/ that are made from the code; run through `with_package.py`."""

from pathlib import Path

from attention_backends.backends.machine.support import support_page
from attention_backends.backends.recommended import recommended_page
from attention_backends.backends.systems import systems_page

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = {"backends.md": support_page, "systems.md": systems_page, "recommended.md": recommended_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        path, text = DOCS / name, page()
        changed = not path.exists() or path.read_text(encoding="utf-8") != text
        path.write_text(text, encoding="utf-8", newline="\n")
        print(f"docs/{name}: {'written' if changed else 'as it was'}")
