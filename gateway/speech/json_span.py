"""Where a JSON object or array ends, found while its text still comes."""


class JsonSpan:
    """Follows one object or array. It counts brackets outside strings and asks for nothing else of the text."""

    def __init__(self) -> None:
        self._depth = 0
        self._is_in_string = False
        self._is_escaped = False

    def end(self, text: str, begin: int) -> int | None:
        """Just past the value, where it ends in `text[begin:]`; else None, and the next call goes on from there."""
        for place in range(begin, len(text)):
            symbol = text[place]
            if self._is_escaped:
                self._is_escaped = False
            elif self._is_in_string:
                self._is_escaped = symbol == "\\"
                self._is_in_string = symbol != '"'
            elif symbol == '"':
                self._is_in_string = True
            elif symbol in "{[":
                self._depth += 1
            elif symbol in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return place + 1
        return None
