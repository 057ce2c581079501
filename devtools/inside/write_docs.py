"""Writes what is made from the code: pages of docs/, the selector's list of backends, README's table of kernel times.

Also `en.md` of each node. Run through `with_package.py`.

ComfyUI's page asks for a node's help in the language that is set, English too, and then for `<node>.md`, which thus is
what people read whose language has no page. So English stands in both.
"""

import runpy
from pathlib import Path

from attention_backends.devtools.pages.backends import support_page
from attention_backends.devtools.pages.node_help import english, sentences, with_list
from attention_backends.devtools.pages.recommended import recommended_page
from attention_backends.devtools.pages.systems import systems_page

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"backends.md": support_page, "systems.md": systems_page, "recommended.md": recommended_page}

if __name__ == "__main__":
    pages = {ROOT / "docs" / name: page() for name, page in PAGES.items()}
    for page in sorted((ROOT / "web" / "docs").glob("*.md")):
        pages[page] = page.read_text(encoding="utf-8")
        if page.stem == "AttentionBackendSelector":
            pages[page] = with_list(pages[page], english())
            for other in sorted(page.with_suffix("").glob("*.md")):
                text = other.read_text(encoding="utf-8")
                pages[other] = with_list(text, sentences(text))
        pages[page.with_suffix("") / "en.md"] = pages[page]
    for path, text in pages.items():
        changed = not path.exists() or path.read_text(encoding="utf-8") != text
        path.write_text(text, encoding="utf-8", newline="\n")
        print(f"{path.relative_to(ROOT).as_posix()}: {'written' if changed else 'as it was'}")
    runpy.run_path(str(ROOT / "benchmarks" / "table.py"))["main"]([])
