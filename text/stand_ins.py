"""What a failed download leaves in the place of a file. Standard library only: preprocessing/ imports it too."""

MARKUP = (b"<!doctype", b"<html", b"<head", b"<?xml")


def find_stand_in(head: bytes) -> tuple[str, str] | None:
    """(what it is, what to do) for a file that only stands in for the wanted one, by its first bytes; else None."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer", "`git lfs pull` fetches the file itself"
    if start.startswith(MARKUP):
        return "a web page", "download the file itself"
    return None
