"""The tokens of one request, and what the scheduler knows about it."""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Tokens
from typing import TYPE_CHECKING

import numpy as np

from belle_compile.runtime.serving.draft_lengths import Acceptance
from belle_compile.runtime.serving.kv_blocks import BlockTable
from belle_compile.runtime.serving.prompt_lookup import PromptLookup
from belle_compile.runtime.serving.scheduling import Scheduling

if TYPE_CHECKING:
    from belle_compile.runtime.serving.prefix_cache import Chain
    from belle_compile.runtime.serving.sampling import Sampler


class Sequence:
    """The tokens of one request: those of `prompt`, followed by those generated.

    `length` tokens are known; the keys and values of the first `computed` are cached. The sequence needs the logits after its
    tokens from index `logits_from` on: an answer needs those after its last token, from which the token for `append` is chosen;
    a prompt that is scored needs those after many of its tokens. No row of logits is needed twice, also if the sequence is
    preempted and computed anew.

    With `prompt_lookup`, or a draft model, a step may also hold some `drafted` tokens: guesses, stored in `tokens` after the
    known ones. Each needs logits too, and `append` returns whether it confirms one. Keys and values that a step cached for
    wrong guesses stay in the cache until the step that reaches their positions overwrites them. No token reads them before,
    since a token attends only to its own position and lower ones.
    """

    def __init__(
        self,
        prompt: Tokens[int],
        max_new_tokens: int,
        prompt_lookup: int = 0,
        *,
        logits_from: int | None = None,
        salt: str = "",
        adapter: str = "",
        scheduling: Scheduling | None = None,
    ) -> None:
        self.prompt_length = len(prompt)
        self.max_length = len(prompt) + max_new_tokens
        self.tokens = np.empty(self.max_length, np.int32)
        self.tokens[: len(prompt)] = prompt
        self.length = len(prompt)
        self.logits_from = self.length - 1 if logits_from is None else logits_from
        self.lookup = PromptLookup(self.tokens, self.length, prompt_lookup) if prompt_lookup else None
        # A sampler for the draft model, which chooses the next tokens as the answer will; None where nothing is chosen.
        self.sampler_ahead: Callable[[], Sampler] | None = None
        self.draft_acceptance = Acceptance()
        self.guesses: list[int] = []  # of the draft model, for the next step
        self.drafted = 0  # tokens in the step under way that are guesses and not confirmed
        self.drafted_by: PromptLookup | Acceptance | None = None  # who has guessed them
        self.guessed_tokens = self.accepted_tokens = 0  # guesses in steps so far, and those of them that were right
        # What the caller asks of the scheduler.
        self.salt = salt  # sequences with different salts share no blocks
        self.adapter = adapter  # digest of the adapter that it is computed with; "" for none
        self.scheduling = scheduling or Scheduling()
        self.deadline = math.inf  # on time.monotonic()
        # What the scheduler keeps.
        self.rank = (
            0,
            0,
        )  # (priority, number of the arrival): the order of the sequences that run
        self.picked = False  # whether it was first in the queue once
        self.charged = 0  # tokens that its client was charged for
        self.exact_length = self.max_length  # tokens whose keys and values do not depend on how they are divided into steps
        self.computed = 0
        self.scheduled = 0  # tokens in the step under way; 0 if they are computed again in the next one
        self.logit_rows = 0  # tokens in the step under way whose logits are returned
        self.slot = -1  # row of the block table while the sequence is running
        self.blocks: BlockTable | None = None
        self.chain: Chain | None = None
        self.publish_at = 0  # number of computed tokens at which the prefix cache is to be updated
        self.held_until: int | None = None  # number of the step until which it may wait for others to compute its prefix
        self.look_again_at = 0  # number of the step before which its prefix cannot be computed
        self.cached_tokens = 0  # of the prompt, from the prefix cache
        self.preemptions = 0
        self.lost = 0  # tokens that were computed when it was preempted last
        self.last_token_at = 0.0

    @property
    def generated(self) -> list[int]:
        """Tokens after the prompt."""
        tokens: list[int] = self.tokens[self.prompt_length : self.length].tolist()
        return tokens

    def append(self, token: int) -> bool:
        """Add the next token. Returns True if it was drafted: then it is computed, and the next row has the logits after it."""
        confirmed = self.drafted > 0 and bool(self.tokens[self.length] == token)
        self.tokens[self.length] = token
        self.logits_from = self.length
        self.length += 1
        if confirmed:
            self.accepted_tokens += 1
            if self.drafted_by:
                self.drafted_by.accepted += 1
            self.computed += 1
            self.drafted -= 1
        else:
            self.drafted = 0
        return confirmed
