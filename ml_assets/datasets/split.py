"""Which side of the split a row is on."""

from hashlib import sha256


def is_evaluation(key: str, share: float) -> bool:
    """Whether rows with this key evaluate (`share` of all keys) or train.

    The side depends on the key alone, so a row never changes sides as the data grows, and a larger share only
    moves training rows to evaluation.
    """
    return int.from_bytes(sha256(f"split {key}".encode()).digest()[:8]) < share * 2**64
