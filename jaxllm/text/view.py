"""A text cut into coloured tokens with their ids, for eyes: where words break, where bytes fall back."""

from collections.abc import Iterable

from rich.text import Text

from jaxllm.text.tokenizer import Tokenizer

_STYLES = ("black on #e69f00", "black on #56b4e9", "black on #35b895", "black on #f0e442", "black on #e08fbf")
_VISIBLE = str.maketrans({" ": "·", "\n": "⏎", "\t": "→", "\r": "␍", "\0": "␀"})


def coloured_tokens(tokenizer: Tokenizer, tokens: Iterable[int], *, ids: bool = True) -> Text:
    """The tokens in turning colours, each followed by its id; a line of text ends where the text's own line does.

    Blanks are drawn (`·` space, `⏎` newline, `→` tab), bytes that are no character of their own are shown in hex.
    """
    view = Text()
    for place, token in enumerate(tokens):
        shown = spelling(tokenizer, token)
        view.append(shown, style="reverse" if token in tokenizer.special_ids else _STYLES[place % len(_STYLES)])
        if ids:
            view.append(f"{token} ", style="dim")
        if shown.endswith("⏎"):
            view.append("\n")
    return view


def spelling(tokenizer: Tokenizer, token: int) -> str:
    """One token as visible characters."""
    if token in tokenizer.special_ids:
        return tokenizer.special_tokens[token]
    piece = tokenizer.token_bytes(token)
    try:
        text = piece.decode().translate(_VISIBLE)
    except UnicodeDecodeError:
        text = ""
    return text if text.isprintable() and text else "".join(f"<{value:02X}>" for value in piece)
