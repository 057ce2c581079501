"""The page docs/recommended.md: advisories by model family."""

from __future__ import annotations

from ...backends.observe.advisories import ADVISORIES


def recommended_page() -> str:
    """The text of docs/recommended.md."""
    lines = [
        "# Recommended by model",
        "",
        "<!-- Generated from backends/observe/advisories.py. A test fails when this page is stale. -->",
        "",
        "Where trouble is known with kernels that are not exact, by model family. The input *exceptions for this "
        "model* of **Attention Backend Selector** takes an exact kernel there, the one that `auto` takes, and leaves "
        "the rest of the model to the backend that you chose. New nodes have it on; ComfyUI's settings under "
        "Attention Backends change that. A graph in API form that leaves it out has new nodes where it is opened in "
        "the page, and has it off where a script sends it. Where it is off, a run that would have been concerned "
        "says so in its report and on the selector.",
        "",
        "- A role in **Per-Role Attention Config**, a window in **Attention Schedule**, and both in a configuration "
        "from text stand above it, before or after the selector in the graph: it only takes the place of a default.",
        "- In the report, such calls have a source that begins with `recommended for`.",
        "- An exact backend, and `auto` with `accuracy` `exact`, need none of it.",
        "- Steps are those of each sampler: with two of them, as in Wan 2.2 14B, the first and the last of both. "
        "Sampling in two steps is then exact altogether.",
        "- Masked text: calls that come with a mask which hides or weighs something, also where the hidden keys are "
        "left out before the kernel runs. Reports do not tell the two apart.",
        "- Reported: by others, named; tried on their cards with their versions. This project has measured none of it.",
        "",
        "| model | family | runs exactly | with | because | evidence |",
        "|---|---|---|---|---|---|",
    ]
    for row in ADVISORIES:
        families = ", ".join(f"`{family}`" for family in row.families)
        evidence = f"{row.evidence}: {row.source}"
        lines.append(f"| {row.title} | {families} | {row.what} | {row.kernels} | {row.reason} | {evidence} |")
    lines += [
        "",
        "`GET /attention_backends/recommended` has the same as JSON. Other families have no row: no source was "
        "found that says where in the model trouble occurs; the [guard](guard.md) finds bad blocks of any model.",
    ]
    return "\n".join(lines) + "\n"
