"""Files that must arrive whole: downloads and digests."""

import hashlib
import shutil
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from gddim.errors import UserError, from_extra
from gddim.storage import locked

_TIMEOUT_SECONDS = 30


def digest(path: Path, algorithm: str) -> str:
    """Hexadecimal digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def fetch(url: str, path: Path, md5: str) -> None:
    """Downloads `url` to `path`, whole and with the right digest or not at all.

    What an interrupted download left in `path.part` is continued, or begun again where that cannot give the digest.
    Of several processes one downloads and the others wait. Raises UserError that says which file to put where.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.parent / ".lock"):
            resumed = part.exists()
            if path.exists():
                return
            _download(url, part)
            if digest(part, "md5") != md5 and resumed:
                part.unlink()
                _download(url, part)
            if digest(part, "md5") != md5:
                part.unlink()
                raise UserError(f"{url} has another md5 sum than {md5}: put {path.name} into {path.parent} yourself")
            part.replace(path)
    except (OSError, HTTPException) as error:
        raise UserError(f"cannot download {url} ({error}): try again, or put {path.name} into {path.parent}") from error


def _download(url: str, part: Path) -> None:
    """Appends to `part` what it lacks of `url`, from the beginning if the server cannot continue."""
    start = part.stat().st_size if part.exists() else 0
    try:
        request = Request(url, headers={"Range": f"bytes={start}-"} if start else {})
        response = urlopen(request, timeout=_TIMEOUT_SECONDS)
    except HTTPError as error:
        if error.code == 416:  # nothing lies beyond what is here
            return
        raise
    with response, open(part, "ab" if response.status == 206 else "wb") as file:
        begin = file.tell()
        expected = int(response.headers.get("Content-Length", 0))
        with from_extra("train"):
            from tqdm import tqdm

        with tqdm.wrapattr(response, "read", total=expected or None, desc=part.stem, disable=None) as counted:
            shutil.copyfileobj(counted, file, 2**20)
        if file.tell() - begin < expected:
            raise ConnectionError("the connection ended early")
