"""Training samples: conversations drawn from the text, as token ids with marks on what is to be learned."""

import random
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from .glossary import GLOSSARY
from .text import (
    GREETING_ANSWER,
    GREETINGS,
    HURRIED_TERM_QUESTIONS,
    SUM_QUESTIONS,
    SYSTEM_TEXTS,
    TERM_QUESTIONS,
    Turn,
    loosen,
    split_sums,
    sum_turn,
    term_turns,
)
from .tokenizer import BOS, EOS, MAX_POSITIONS, ROLE_MARKERS

TERM_SHARE, GREETING_SHARE = 0.3, 0.01
PLAIN_SHARE, SYSTEM_SHARE, HURRIED_SHARE = 0.15, 0.15, 0.2
# (share, fewest turns, most turns): mostly single questions, and some chats that fill all positions.
CHAT_LENGTHS = ((0.60, 1, 1), (0.32, 2, 4), (0.06, 5, 12), (0.02, 13, 40))


@dataclass(frozen=True, slots=True)
class Sample:
    """Token ids, and for each whether the model has to predict it (answers and their end markers)."""

    token_ids: list[int]
    is_target: list[bool]


class SampleSource:
    """Draws samples without end; the same `rng` state gives the same samples. Owns a cache of encodings."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> None:
        self._tokenizer = tokenizer
        self._rng = rng
        self._sums, _ = split_sums()
        self._encoded: dict[str, list[int]] = {}
        self._marker = {role: tokenizer.convert_tokens_to_ids(mark) for role, mark in ROLE_MARKERS.items()}
        self._bos = tokenizer.convert_tokens_to_ids(BOS)
        self._eos = tokenizer.convert_tokens_to_ids(EOS)

    def draw(self) -> Sample:
        """A plain prompt with its answer, or a conversation of one or more turns."""
        if self._rng.random() < PLAIN_SHARE:
            return self._plain(self._draw_turn())
        (_, fewest, most) = self._rng.choices(CHAT_LENGTHS, [share for share, _, _ in CHAT_LENGTHS])[0]
        turns = [self._draw_turn() for _ in range(self._rng.randint(fewest, most))]
        return self.encode_chat(self._draw_system(), turns)

    def _draw_turn(self) -> Turn:
        is_hurried = self._rng.random() < HURRIED_SHARE
        if not is_hurried:
            return self._draw_neat_turn(TERM_QUESTIONS)
        turn = self._draw_neat_turn(TERM_QUESTIONS + HURRIED_TERM_QUESTIONS)
        return turn._replace(question=loosen(turn.question, self._rng))

    def _draw_neat_turn(self, term_questions: tuple[str, ...]) -> Turn:
        kind = self._rng.random()
        if kind < GREETING_SHARE:
            return Turn(self._rng.choice(GREETINGS), GREETING_ANSWER)
        if kind < GREETING_SHARE + TERM_SHARE:
            return self._rng.choice(term_turns(self._rng.choice(GLOSSARY), term_questions))
        return sum_turn(*self._rng.choice(self._sums), self._rng.choice(SUM_QUESTIONS))

    def _draw_system(self) -> str | None:
        if self._rng.random() >= SYSTEM_SHARE:
            return None
        # Half of them say anything at all, so that the model learns not to mind an unknown system text.
        if self._rng.random() < 0.5:
            return self._rng.choice(GLOSSARY).answer
        return self._rng.choice(SYSTEM_TEXTS)

    def _plain(self, turn: Turn) -> Sample:
        # Some servers leave the begin marker out of plain prompts.
        prompt = [self._bos] if self._rng.random() < 0.7 else []
        prompt += self._encode(turn.question)
        answer = [*self._encode("\n"), *self._encode(turn.answer), self._eos]
        return Sample(prompt + answer, [False] * len(prompt) + [True] * len(answer))

    def encode_chat(self, system: str | None, turns: list[Turn]) -> Sample:
        token_ids, is_target = [self._bos], [False]
        if system is not None:
            token_ids += [self._marker["system"], *self._encode(system), self._eos]
        for turn in turns:
            token_ids += [self._marker["user"], *self._encode(turn.question), self._eos]
            token_ids += [self._marker["assistant"]]
            is_target += [False] * (len(token_ids) - len(is_target))
            token_ids += [*self._encode(turn.answer), self._eos]
            is_target += [True] * (len(token_ids) - len(is_target))
        return Sample(token_ids[:MAX_POSITIONS], is_target[:MAX_POSITIONS])

    def _encode(self, text: str) -> list[int]:
        if text not in self._encoded:
            self._encoded[text] = self._tokenizer.encode(text, add_special_tokens=False)
        return self._encoded[text]
