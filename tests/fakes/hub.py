"""kernels 0.15: get_kernel with its local overrides, its check of the publisher, its cache and its redirections.

Nothing is downloaded: the Hub is a table, and what would be fetched is written down.
"""

from __future__ import annotations

import warnings
from types import ModuleType

import pytest

from . import amd_aiter, flash_attn_2, flash_attn_3, flash_attn_4, sageattn3

REPOSITORIES = {
    ("kernels-community/flash-attn2", 3): flash_attn_2,
    ("kernels-community/flash-attn3", 1): flash_attn_3,
    ("kernels-community/flash-attn4", 0): flash_attn_4,
    ("kernels-community/sage-blackwell", 1): sageattn3,
    ("kernels-community/aiter-flash-attn-ck", 1): amd_aiter,
}
PUBLISHERS = {"kernels-community"}
REDIRECTIONS: dict[str, str] = {}
LOCAL: dict[str, ModuleType] = {}
"""What LOCAL_KERNELS names."""
CACHE: set[str] = set()
OFFLINE = False
"""HF_HUB_OFFLINE."""
FORBIDDEN = False
"""Whether the person forbade downloads: then being called at all fails the test."""
DOWNLOADS: list[str] = []


def get_kernel(
    repo_id: str,
    revision: str | None = None,
    version: int | None = None,
    backend: str | None = None,
    user_agent: str | None = None,
    trust_remote_code: bool | list[str] = False,
) -> ModuleType:
    if FORBIDDEN:
        pytest.fail(f"get_kernel({repo_id!r}) was called although downloads are not allowed")
    if repo_id in LOCAL:
        return LOCAL[repo_id]
    if trust_remote_code is not True and not OFFLINE and repo_id.split("/")[0] not in PUBLISHERS:
        raise ValueError(f"Kernel repository '{repo_id}' is not from a trusted publisher.")
    if (revision is None) == (version is None):
        raise ValueError("Either a revision or a version must be specified, and not both.")
    if (repo_id, version) not in REPOSITORIES:
        known = sorted(known for repo, known in REPOSITORIES if repo == repo_id)
        raise ValueError(f"Version {version} not found, available versions: {known}")
    if OFFLINE and repo_id not in CACHE:
        raise FileNotFoundError(
            f"Cannot find a local snapshot for {repo_id}. When Hugging Face Hub is in offline mode the kernel must "
            "already be present in the local cache."
        )
    if not OFFLINE and repo_id in REDIRECTIONS:
        warnings.warn(f"'{repo_id}' redirected to '{REDIRECTIONS[repo_id]}'", UserWarning, stacklevel=2)
        repo_id = REDIRECTIONS[repo_id]
    if repo_id not in CACHE:
        DOWNLOADS.append(f"{repo_id}@{version}")
    return REPOSITORIES.get((repo_id, version or 0), ModuleType(repo_id))
