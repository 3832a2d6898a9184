"""Files that a table names, below a local folder and never outside of it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from data_prep.fetch import Failed
from data_prep.record import LocalFile, Payload, Rejected, file_stamp


def inside_folder(text: str, root: str) -> tuple[Payload, str, str]:
    """Payload, identity and stamp of a file that ``text`` names below a local folder."""
    try:
        path = os.path.realpath(os.path.join(root, text))
        if not path.startswith(root.rstrip("/") + "/"):
            return Failed(f"outside of {root}"), text, "outside"
        return TableFile(path, root), text, file_stamp(path)
    except (FileNotFoundError, NotADirectoryError):
        return TableFile(path, root), text, "missing"
    except (ValueError, OSError) as error:
        return Failed(f"not a path: {error}"), text, "broken"


@dataclass(frozen=True, slots=True)
class TableFile:
    """A file that a table names. One that is missing is rejected; a missing root folder stops the build."""

    path: str
    root: str

    def read(self) -> bytes:
        """The file's content."""
        try:
            return LocalFile(self.path).read()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            os.stat(self.root)
            raise Rejected("no such file") from error
