"""Distributions to sample from, and candidates drawn from them: temperature, top-k and top-p, for target and draft
alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from koala_bench.errors import KoalaBenchError

_COLDEST = 1e-4
_FEW = 64  # most likely tokens that a nucleus is looked for in first


@dataclass(frozen=True)
class Sampling:
    """How logits become the distribution that tokens are drawn from.

    Temperature comes first, then top-k, then top-p on what top-k left, the order of transformers' ``generate``. Tokens
    as likely as the last one kept are kept too, so that what is kept does not depend on how ties are sorted.

    Attributes:
        temperature: divides the logits.
        top_k: keep so many of the most likely tokens; 0 keeps all.
        top_p: keep the most likely tokens until they hold this much of the probability; 1 keeps all.

    Raises:
        KoalaBenchError: the temperature is not above 0 (greedy decoding is a rule of its own), ``top_k`` is negative,
            or ``top_p`` does not lie in (0, 1].
    """

    temperature: float
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        if self.top_k < 0:
            raise KoalaBenchError(f"--top-k is {self.top_k}.", "Give the number of tokens to keep, or 0 for all.")
        if not 0 < self.top_p <= 1:
            raise KoalaBenchError(f"--top-p is {self.top_p}.", "Give a number above 0 and up to 1; 1 keeps all tokens.")

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """The distributions [..., vocab_size] of logits [..., vocab_size]; float64 of float64, otherwise float32."""
        scores = logits if logits.dtype == torch.float64 else logits.float()
        scores = scores / self.temperature
        if 0 < self.top_k < scores.shape[-1]:
            scores = scores.masked_fill(scores < scores.topk(self.top_k).values[..., -1:], -math.inf)
        found = torch.softmax(scores, dim=-1)
        if self.top_p < 1:
            found = found.masked_fill(found < _least_of_nucleus(found, self.top_p), 0)
            found = found / found.sum(-1, keepdim=True)
        return found


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that nothing can be sampled at.

    Raises:
        KoalaBenchError: it is not a finite number of at least 0.0001.
    """
    if not _COLDEST <= temperature < math.inf:
        raise KoalaBenchError(
            f"--temperature is {temperature}.", f"Sample at {_COLDEST:g} or more; 0 decodes greedily."
        )


def _least_of_nucleus(found: torch.Tensor, top_p: float) -> torch.Tensor:
    """The smallest probability [..., 1] among the most likely tokens that together hold ``top_p``."""
    size = found.shape[-1]
    # Sorting a whole vocabulary takes a CPU longer than all the rest of a step; a GPU should rather not be asked
    # whether a part was enough.
    count = size if found.is_cuda else min(_FEW, size)
    while True:
        best = found.topk(count).values
        inside = ((best.cumsum(-1) - best) < top_p).sum(-1, keepdim=True)
        if count == size or bool((inside < count).all()):
            return best.gather(-1, inside.clamp(min=1) - 1)
        count = min(4 * count, size)


class Draws:
    """A head's candidates as draws without replacement, in the order drawn: a ``Pick`` for rules that sample.

    Every token's turn comes after an exponential time whose rate is its probability (the race behind
    ``torch.multinomial``), here with random numbers of 53 bits, because those of 24 bits would never draw some of the
    unlikely tokens. Where top-k or top-p leave fewer tokens than are wanted, the next best by their logits follow.
    Their probability is 0, and ``SpeculativeSampling`` takes a proposal of probability 0 for one that was certain,
    which given the ones before it it is, so nothing is lost.

    A call costs 10 to 20 ns per row and token on a CPU (8 rows of 4,096 tokens: 0.3 ms, of 32,000: 4 ms; picking the
    best 0.04 and 0.3 ms) and as much again with top-p. It reads nothing from the device.

    Args:
        sampling: the target's own, so that the draft is drawn as the target will be.
        generator: on the CPU. On another device a generator of its own is used, seeded from this one at the first call.
    """

    def __init__(self, sampling: Sampling, generator: torch.Generator) -> None:
        self.sampling = sampling
        self._generators = {torch.device("cpu"): generator}
        self._generator = generator

    def __call__(self, logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw from each row of logits [rows, vocab_size]: ids [rows, count] and the distributions [rows, vocab_size]."""
        found = self.sampling.probabilities(logits)
        # Times are made in place: at 32,000 tokens fetching fresh memory takes longer than the arithmetic.
        times = torch.rand(
            found.shape, dtype=torch.float64, device=found.device, generator=self._generator_on(found.device)
        )
        speeds = torch.div(found, times.neg_().log1p_().neg_(), out=times)
        if self.sampling.top_k or self.sampling.top_p < 1:
            speeds = torch.where(found > 0, speeds, logits - logits.amax(-1, keepdim=True) - 1)
        return speeds.topk(count, dim=-1).indices, found

    def _generator_on(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            seed = int(torch.randint(2**62, (), generator=self._generator))
            self._generators[device] = torch.Generator(device).manual_seed(seed)
        return self._generators[device]
