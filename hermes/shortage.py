"""What a machine lacks: disk, rights or memory, read from the errors of libraries."""

import errno
import os
import re
import shutil
from pathlib import Path

CUT = ("unexpected pos ", "PytorchStreamWriter failed writing file")  # of torch, which does not say why
NO_MEMORY = ("can't allocate memory", "out of memory", "std::bad_alloc")  # of torch on a CPU and on CUDA, and of C++


def lack(error: BaseException | None) -> str | None:
    """What the machine lacked, and what to do, where that is why a library failed; None of another error.

    Libraries that are not Python's say it in words alone, so these are read, too.
    """
    while error is not None:
        said = " ".join(str(error).split())
        number = getattr(error, "errno", None)
        if found := re.search(r"\(os error (\d+)\)|\[Errno (\d+)\]", said):
            number = number or int(found[1] or found[2])
        named = getattr(error, "filename", None)
        where = named or Path.cwd()
        if number in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in said:
            free = shutil.disk_usage(Path.cwd()).free / 2**30
            return f"{where}: no space left ({free:.1f} GiB free here); free some and run the same command again, it goes on"
        if any(words in said for words in CUT):
            free = shutil.disk_usage(Path.cwd()).free / 2**30
            return f"{where}: a file could not be written to its end ({free:.1f} GiB free here); free some and run the same command again"
        if number == errno.EFBIG:
            return f"{where}: the file would be larger than this process may write; raise `ulimit -f` and run the same command again"
        if number == errno.EROFS:
            return f"{where}: {os.strerror(number)}; make it writable and run the same command again"
        if named and number in (errno.EACCES, errno.EPERM):
            return f"{where}: {os.strerror(number)}; give this user the right to it and run the same command again"
        if isinstance(error, MemoryError) or number == errno.ENOMEM or any(words in said for words in NO_MEMORY):
            return f"not enough memory ({said[:200] or type(error).__name__}); `make plan` says what a run needs"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None
