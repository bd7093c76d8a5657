"""What others do wrong, said once: whoever misbehaves can do it again a thousand times a second."""

from __future__ import annotations

SAY_AGAIN_S = 60.0
MAX_OF_ONE = 8
"""Different complaints about one party within SAY_AGAIN_S; further ones are swallowed."""
MAX_SAID = 256
MAX_CHARACTERS = 300


class Complaints:
    """Owner of what was said lately; bounded, whatever others do."""

    def __init__(self) -> None:
        self._said: dict[tuple[str, str], float] = {}

    def is_news(self, who: str, reason: str, now_s: float) -> bool:
        """Whether to log `reason` about `who` now; then it counts as said."""
        self._said = {key: said_s for key, said_s in self._said.items() if now_s - said_s < SAY_AGAIN_S}
        key = (who, reason[:MAX_CHARACTERS])
        if key in self._said or len(self._said) >= MAX_SAID:
            return False
        if sum(other == who for other, _ in self._said) >= MAX_OF_ONE:
            return False
        self._said[key] = now_s
        return True
