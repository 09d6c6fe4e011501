"""What stands in the place of a file: a failed download, a compressed file.

Standard library only: preprocessing/ imports it too.
"""

COMPRESSED = (  # first bytes of files that none of our readers unpacks, what they are, and what to do with them
    (b"\x28\xb5\x2f\xfd", "a zstd file", "unpack it with `unzstd FILE`"),
    (b"\xfd7zXZ\x00", "an xz file", "unpack it with `unxz FILE`"),
    (b"BZh", "a bzip2 file", "unpack it with `bunzip2 FILE`"),
)
MARKUP = (b"<!doctype", b"<html", b"<head", b"<?xml")


def find_stand_in(head: bytes) -> tuple[str, str] | None:
    """(what it is, what to do) for a file that only stands in for the wanted one, by its first bytes; else None."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer", "`git lfs pull` fetches the file itself"
    if start.startswith(MARKUP):
        return "a web page", "download the file itself"
    return None
