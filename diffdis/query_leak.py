"""How much of a noised text query e_t gives its text away, so that a model can retrieve it without any image (the shortcut)."""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from diffdis import schedule
from diffdis.config import DiffDisConfig, ObjectiveConfig
from diffdis.text_encoder import TextEncoder, build_text_encoder
from diffdis.warm_start import resolve_pretrained

logger = logging.getLogger(__name__)

NUM_SAMPLES = 4096  # of (t_e, noise), over all texts
MAX_TEXTS = 1024
TOLERATED = 0.10  # above chance: more is warned about


class QueryLeak(NamedTuple):
    """Result of `query_leak`."""

    answerable: float  # fraction of samples (t_e, noise) whose text is the nearest of all texts to e_t
    chance: float  # 1 / number of texts
    num_texts: int

    def summary(self) -> dict[str, Any]:
        """Return the fields, rounded for a description of the run."""
        return {"answerable": round(self.answerable, 3), "chance": round(self.chance, 4), "num_texts": self.num_texts}


def query_leak(queries: torch.Tensor, config: DiffDisConfig, objective: ObjectiveConfig) -> QueryLeak:
    """Measure how often argmax_j <e_t, e_j> finds the right text without any image, at the t_e that training samples.

    Logs a warning if that is more than `TOLERATED` above chance. A trained model does better than this bound where texts leave
    directions free that noise cannot reach, and worse where it has not learned to copy.

    Args:
        queries: text queries [N, D], unit norm, of distinct texts; of more than `MAX_TEXTS`, the first ones count.
        config: the model's configuration, for its schedule and query_snr.
        objective: the objective's configuration, for query_timestep_min.
    """
    e = queries[:MAX_TEXTS].detach().float().cpu()
    generator = torch.Generator().manual_seed(0)
    abar = schedule.alphas_cumprod(config.schedule)
    num_correct = num_samples = 0
    while num_samples < NUM_SAMPLES:
        t = torch.randint(objective.query_timestep_min, config.schedule.num_timesteps, (len(e),), generator=generator)
        noise = torch.randn(e.shape, generator=generator)
        e_t = schedule.add_noise(e, noise, abar[t], config.schedule.query_snr)
        num_correct += int(((e_t @ e.T).argmax(dim=1) == torch.arange(len(e))).sum())
        num_samples += len(e)
    leak = QueryLeak(num_correct / num_samples, 1 / len(e), len(e))
    if leak.answerable > leak.chance + TOLERATED:
        logger.warning(
            "model.schedule.query_snr: %.0f %% of the noised text queries can be answered without the image (chance %.1f %% of "
            "%d texts), and the model may learn to copy them; use a smaller query_snr or a larger objective.query_timestep_min",
            *(100 * leak.answerable, 100 * leak.chance, leak.num_texts),
        )
    return leak


def describe_captions(
    config: DiffDisConfig, objective: ObjectiveConfig, captions: Sequence[str], text_encoder: TextEncoder | None = None
) -> dict[str, Any]:
    """Return the `query_leak` of the distinct captions, for the description of a run.

    Empty for fewer than two texts, and for a task without noised queries. Builds the text encoder if none is given.
    """
    distinct = list(dict.fromkeys(captions))[:MAX_TEXTS]
    if objective.task in ("generation", "clip") or len(distinct) < 2:
        return {}
    if text_encoder is None:
        config = resolve_pretrained(config)
        text_encoder = build_text_encoder(config.text_encoder)
    device = next(text_encoder.model.parameters()).device
    return {"query_leak": query_leak(text_encoder.encode(distinct, device)[1], config, objective).summary()}
