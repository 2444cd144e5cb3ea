"""Where torch.compile keeps its code from one start to the next."""

import os
from pathlib import Path

from torch._inductor.runtime.cache_dir_utils import default_cache_dir


def keep_compiled_code() -> None:
    """Moves torch.compile's cache from its temporary folder to the user's cache, which outlives a reboot.

    ``TORCHINDUCTOR_CACHE_DIR`` wins where a user has set it; torch sets it itself, to its default, when it is imported.
    A folder that cannot be made, is another user's, or can be written to by others is not taken, for what lies there is
    run; torch's own choice then stays.
    """
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_cache_dir()) != default_cache_dir():
        return
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME", ""))
        folder = (base if base.is_absolute() else Path.home() / ".cache") / "gpt2_lightning" / "inductor"
        folder.parent.parent.mkdir(parents=True, exist_ok=True)
        for made in (folder.parent, folder):
            made.mkdir(mode=0o700, exist_ok=True)
        if not (os.access(folder, os.W_OK) and _is_ours_alone(folder) and _is_ours_alone(folder.parent)):
            return
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


def _is_ours_alone(folder: Path) -> bool:
    if os.name != "posix":
        return True
    status = folder.stat()
    return status.st_uid == os.getuid() and not status.st_mode & 0o022
