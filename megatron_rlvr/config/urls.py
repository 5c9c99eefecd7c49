"""URLs of servers in settings."""

import re
from collections.abc import Sequence
from typing import Any

from megatron_rlvr.config.yaml_format import shown

_URL = re.compile(r"https?://([\w.-]+|\[[0-9a-fA-F:.]+\])(:(?P<port>[0-9]{1,5}))?")
_MAX_PORT = 2**16 - 1


def without_slash(urls: Sequence[Any]) -> list[Any]:
    """Return URLs without a slash at the end; anything else is left to validation."""
    return [url.removesuffix("/") if isinstance(url, str) else url for url in urls]


def check_urls(key: str, urls: Sequence[str]) -> None:
    """Raise ValueError for a text that is not the URL of a server, and for one that is given twice.

    Args:
        key: The setting, for messages.
    """
    for url in urls:
        match = _URL.fullmatch(url)
        if not match or int(match["port"] or 80) > _MAX_PORT:
            without_password = re.sub(r"//[^/]*@", "//...@", url)
            raise ValueError(f"{key}={shown(without_password)}: not the URL of a server; write it as http://HOST:PORT")
    twice = sorted({url for url in urls if urls.count(url) > 1})
    if twice:
        raise ValueError(f"{key}={twice[0]}: given twice; remove one of them")
