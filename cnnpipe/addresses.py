"""Credentials that are part of an address: found before it is kept, left out of what is printed."""

import re
from urllib.parse import unquote

# A user before the host; signed addresses of S3, Google, Azure and CloudFront; tokens and keys.
SECRET = (
    r"(?i)^(?:[a-z0-9+.-]*:)?/*[^/?#]*@"
    r"|[?&;#][^=&;#]*(?:signature|credential|token|secret|passw|api[-_]?key|access[-_]?key|accessid"
    r"|key-pair)[^=&;#]*="
    r"|[?&;#](?:sig|key|pwd|auth|authorization|hmac|jwt|policy)="
)
"""A regular expression that is found in an address with credentials."""

WHERE_CREDENTIALS_BELONG = "the environment, ~/.aws (for s3://) or ~/.netrc (for https://)"


def has_secret(address: str) -> bool:
    """Whether a user, a password, a token or a signature is part of the address."""
    return bool(re.search(SECRET, unquote(address)))


def without_secrets(text: str) -> str:
    """The text without users and queries in the addresses that it mentions.

    What a library says of an error may repeat an address to which a server has sent it on, which
    often is a signed one.
    """
    return re.sub(r"\?[^\s'\"<>)]+", "?...", re.sub(r"//[^\s/'\"<>]*@", "//", text))
