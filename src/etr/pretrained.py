"""What transformers reads for this project: files of this machine, and no code among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def from_local(auto_class: Any, name_or_path: str | Path, **options: Any) -> Any:
    """Call ``auto_class.from_pretrained``; nothing is downloaded, and no code of a folder runs.

    Every call of an Auto class of transformers goes through here.

    Args:
        auto_class: AutoConfig, AutoTokenizer, AutoModel or the like.
        name_or_path: a folder, or a name in the local Hugging Face cache.
        options: further arguments.
    Raises:
        ValueError: a file of the folder is a link that leaves it, or it needs code of its own.
        OSError: there is no such folder or name here.
    """
    if Path(name_or_path).is_dir():
        check_links(Path(name_or_path))
    return auto_class.from_pretrained(
        str(name_or_path), **options, local_files_only=True, trust_remote_code=False
    )


def check_links(folder: Path) -> None:
    """Refuse a folder whose files are links to somewhere else.

    A snapshot in the Hugging Face cache, ``models--NAME/snapshots/REVISION``, keeps its files in
    ``models--NAME/blobs``: those links may leave it.

    Raises:
        ValueError: names the link.
    """
    root = folder.resolve()
    cache = root.parent.parent
    blobs = None
    if root.parent.name == "snapshots" and cache.name.startswith("models--"):
        blobs = cache / "blobs"
    for path in sorted(root.iterdir()):
        if not path.is_symlink() or path.is_dir():
            continue
        try:
            target = path.resolve()
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{path} is a link that leads nowhere: {error}") from error
        if not target.is_relative_to(root) and target.parent != blobs:
            raise ValueError(
                f"{path} is a link to {target}, outside of its folder; put a copy of the file in "
                "the folder"
            )
