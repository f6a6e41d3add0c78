"""UTF-8 bytes of a str, also of one that holds half a surrogate pair (JSON's "\\ud800"), which UTF-8 can't spell."""


def to_utf8(text: str) -> bytes:
    """The text's UTF-8 bytes. Two surrogates that make a character become it; a lone one becomes U+FFFD."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode()
