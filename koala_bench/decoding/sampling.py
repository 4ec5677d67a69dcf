"""Temperature, top-k and top-p for target and draft alike, and candidates sampled from the result."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from koala_bench.errors import KoalaBenchError

_MIN_TEMPERATURE = 1e-4
_FIRST_TOP = 64  # most likely tokens searched first for the nucleus


@dataclass(frozen=True)
class Sampling:
    """How logits become the distribution that tokens are drawn from.

    Temperature comes first, then top-k, then top-p on what top-k left, the order of transformers' ``generate``. Ties
    with the last token kept are kept too, so that the order of ties does not matter.

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
        p = torch.softmax(scores, dim=-1)
        if self.top_p < 1:
            p = p.masked_fill(p < _nucleus_minimum(p, self.top_p), 0)
            p = p / p.sum(-1, keepdim=True)
        return p


def check_temperature(temperature: float) -> None:
    """Check that a temperature can be sampled at. Raises KoalaBenchError where it is not a finite number of at
    least 0.0001."""
    if not _MIN_TEMPERATURE <= temperature < math.inf:
        raise KoalaBenchError(
            f"--temperature is {temperature}.", f"Sample at {_MIN_TEMPERATURE:g} or more; 0 decodes greedily."
        )


def _nucleus_minimum(p: torch.Tensor, top_p: float) -> torch.Tensor:
    """The smallest probability [..., 1] among the most likely tokens that together hold ``top_p``."""
    size = p.shape[-1]
    # On a CPU sorting the vocabulary takes longer than the rest of a step; on a GPU checking a part would synchronise.
    count = size if p.is_cuda else min(_FIRST_TOP, size)
    while True:
        top = p.topk(count).values
        inside = ((top.cumsum(-1) - top) < top_p).sum(-1, keepdim=True)
        if count == size or bool((inside < count).all()):
            return top.gather(-1, inside.clamp(min=1) - 1)
        count = min(4 * count, size)


class Draws:
    """A head's candidates as draws without replacement, in the order drawn: a ``Pick`` for rules that sample.

    The exponential race behind ``torch.multinomial``: a token arrives after an exponential time with its probability as
    rate. Random numbers have 53 bits; those of 24 bits would never draw some unlikely tokens. If top-k or top-p leave
    too few tokens, the next best by logits follow. Their probability is 0, and ``SpeculativeSampling`` takes a proposal
    of probability 0 as certain, which given the draws before it is true.

    A call costs 10 to 20 ns per row and token on a CPU (8 rows of 4,096 tokens: 0.3 ms, of 32,000: 4 ms; the most
    likely ones 0.04 and 0.3 ms) and as much again with top-p. On a CPU tokens of score -inf in every row, those outside
    of a draft vocabulary, get no random numbers. It reads nothing from a GPU.

    Args:
        sampling: the target's own, so that draft and target are sampled alike.
        generator: on the CPU. For another device a second one is seeded from it at the first call.
    """

    def __init__(self, sampling: Sampling, generator: torch.Generator) -> None:
        self.sampling = sampling
        self._generators = {torch.device("cpu"): generator}
        self._generator = generator

    def __call__(self, logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample from each row of logits [rows, vocab_size]: ids [rows, count], distributions [rows, vocab_size]."""
        if logits.device.type == "cpu":  # elsewhere, finding them would synchronise
            ids = (logits > -math.inf).any(0).nonzero()[:, 0]
            if count <= len(ids) <= logits.shape[-1] // 2:
                places, p = self._drawn(logits.index_select(-1, ids), count)
                return ids[places], p.new_zeros(logits.shape).index_copy_(-1, ids, p)
        return self._drawn(logits, count)

    def _drawn(self, logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        p = self.sampling.probabilities(logits)
        # In place: at 32,000 tokens allocating memory takes longer than the arithmetic.
        times = torch.rand(p.shape, dtype=torch.float64, device=p.device, generator=self._generator_on(p.device))
        speeds = torch.div(p, times.neg_().log1p_().neg_(), out=times)
        if self.sampling.top_k or self.sampling.top_p < 1:
            speeds = torch.where(p > 0, speeds, logits - logits.amax(-1, keepdim=True) - 1)
        return speeds.topk(count, dim=-1).indices, p

    def _generator_on(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            seed = int(torch.randint(2**62, (), generator=self._generator))
            self._generators[device] = torch.Generator(device).manual_seed(seed)
        return self._generators[device]
