"""The soft overlong penalty of DAPO (arXiv 2503.14476, equation 13): long answers lose reward before the cap cuts them.

    penalty = 0                          for length <= max - buffer
            = (max - buffer - length) / buffer   in between, falling linearly
            = -1                         for length >= max

It is added to the reward of every answer, right or wrong; it never changes whether an answer counts as correct.
"""


def soft_overlong_penalty(length: int, max_response_tokens: int, buffer: int) -> float:
    """The term that is added to the reward of a response of ``length`` tokens.

    Args:
        length: tokens of the response, the stop token included; >= 0.
        max_response_tokens: the cap on a response, > 0.
        buffer: width in tokens of the zone below the cap in which the penalty grows; 0 means no penalty at all.

    Returns: between 0 and -1.
    Raises: ValueError if the buffer is negative or wider than the cap.
    """
    if not 0 <= buffer <= max_response_tokens:
        raise ValueError(
            f"an overlong buffer of {buffer} tokens does not fit a response of at most {max_response_tokens}; "
            f"choose one from 0 (no penalty) to {max_response_tokens}"
        )
    if buffer == 0:
        return 0.0
    excess = length - (max_response_tokens - buffer)
    return -min(max(excess / buffer, 0.0), 1.0) + 0.0  # + 0.0 turns -0.0 into 0.0, for readable metrics
