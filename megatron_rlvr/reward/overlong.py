"""Soft overlong penalty of DAPO (arXiv 2503.14476, equation 13): responses close to the response cap lose reward.

    penalty = 0                          for length <= max - buffer
            = (max - buffer - length) / buffer   in between, decreasing linearly
            = -1                         for length >= max

The penalty is added to the reward of every response, correct or incorrect; it never changes which of the two it is.
"""


def soft_overlong_penalty(length: int, max_response_tokens: int, buffer: int) -> float:
    """Return the penalty that is added to the reward of a response of ``length`` tokens.

    Args:
        length: Length of the response in tokens, the stop token included; >= 0.
        max_response_tokens: The response cap, > 0.
        buffer: Width in tokens of the zone below the cap in which the penalty grows; 0 means no penalty.

    Returns:
        A number from -1 to 0.

    Raises:
        ValueError: If the buffer is negative or wider than the cap.
    """
    if not 0 <= buffer <= max_response_tokens:
        raise ValueError(
            f"buffer={buffer}: wider than max_response_tokens={max_response_tokens} or negative; "
            f"set 0 (no penalty) to {max_response_tokens}"
        )
    if buffer == 0:
        return 0.0
    excess = length - (max_response_tokens - buffer)
    return -min(max(excess / buffer, 0.0), 1.0) + 0.0  # + 0.0 turns -0.0 into 0.0, for readable metrics
