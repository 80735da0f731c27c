"""A reward that hardly ever is the same twice: the share of spaces in a completion.

A model of random weights never answers right, so that with the real rewards every group would be
dead and a step would skip its backward pass: neither time nor memory would be those of training.
"""


def varied(completions: list[str], **columns: object) -> list[float]:
    """Return the share of spaces in each text, and a little for what the characters are."""
    return [
        (text.count(" ") + sum(map(ord, text)) % 97 / 97) / (len(text) + 1) for text in completions
    ]
