"""Google Cloud Storage by URL, opened alike by both halves."""

from datetime import timedelta
from urllib.parse import parse_qsl, unquote, urlsplit

import pyarrow.fs as pafs

from headrace.schemas.errors import ConfigError

OPTIONS = ("anonymous", "endpoint_override", "scheme")


def open_google(url: str, seconds: float) -> tuple[pafs.FileSystem, str]:
    """The file system of a `gs://` URL, and the path in it.

    Credentials are the application's default ones, or none: `?anonymous=true`, also written
    `gs://anonymous@bucket`. `endpoint_override` and `scheme` name another server.

    Args:
        seconds: after which a request that fails is not made again. Arrow's own limit is 15
            minutes, also where only the credentials are missing.

    Raises:
        ConfigError: the URL has another option.
    """
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query))
    unknown = sorted(options.keys() - {*OPTIONS})
    if unknown:
        raise ConfigError(f"{url}: unknown option {unknown[0]}; known: {', '.join(OPTIONS)}")
    user, _, bucket = parts.netloc.rpartition("@")
    anonymous = options.pop("anonymous", "") == "true" or user == "anonymous"
    limit = timedelta(seconds=seconds)
    filesystem = pafs.GcsFileSystem(anonymous=anonymous, retry_time_limit=limit, **options)
    return filesystem, unquote(f"{bucket}{parts.path}").rstrip("/")
