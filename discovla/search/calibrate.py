"""Probability that a hit answers the query, estimated from the scores of captions of other videos.

Scores of different queries have different levels, so that no single score separates hits from misses.  The
score s of a moment is therefore measured in standard deviations of the scores that the same query gives to
the moments of the index: z = (s - mean) / std.  The best z of captions of other videos has a Gumbel
distribution, as the largest of many; its tail at a hit's z is the p-value that a query whose answer is not
there has a best hit at least as good.  The odds for the hit are at most 1 / (-e p log p) for p < 1 / e, by
Sellke, Bayarri and Berger; above, they are those of a probability that falls to 0 with 1 - p.  They are
multiplied by the odds before the search: a query has an answer in the index as often as not, and the answer
is then the first hit as often as R@1 of the run says.

Source: Sellke, Bayarri and Berger, Calibration of p values for testing precise null hypotheses, The American
Statistician 55 (2001), 62-71, https://doi.org/10.1198/000313001300339950
"""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from discovla.checkpoints import RESULTS
from discovla.data.dataset import read_clips
from discovla.drawn_world.scenes import make_scene
from discovla.drawn_world.wording import phrase, tell
from discovla.model import PLAIN, Model

logger = logging.getLogger(__name__)

DRAWN = f"{PLAIN}drawn"
CAPTIONS = 256  # that calibrate an index
UNKNOWN_RECALL = 0.5  # share of queries whose first hit is right, of a model that was not tested
LEAST = 20  # moments of which a standard deviation is taken
_EULER = 0.5772156649015329
_SUBJECTS = (
    *("a man", "a woman", "two children", "a dog", "a group of people", "a chef", "a musician", "a cat"),
    *(
        "an old lady",
        "a football team",
        "a red car",
        "a train",
        "a presenter",
        "a diver",
        "a horse",
        "a crowd",
    ),
)
_ACTIONS = (
    *("is running", "sings a song", "cooks a meal", "opens a door", "talks to the camera", "falls down"),
    *("plays a game", "draws a picture", "repairs an engine", "jumps", "dances", "sleeps", "turns around"),
    *("waits", "reads a book", "carries a box"),
)
_PLACES = (
    *("in a kitchen", "on the beach", "in the snow", "at night", "on a stage", "in a forest", "on a street"),
    *("in an office", "under water", "in a stadium", "by a lake", "in a workshop"),
)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Gumbel distribution of the best z of captions of other videos.

    location, scale: its parameters.  count: number of captions.  moments: of the index when it was measured.
    recall: share of the queries with an answer in the index whose first hit it is.
    """

    location: float
    scale: float
    count: int
    moments: int
    recall: float

    @classmethod
    def fit(cls, best: np.ndarray, moments: int, recall: float) -> Calibration:
        """Fit the distribution to the best z of each caption, by mean and standard deviation."""
        scale = max(float(best.std(ddof=1)) * math.sqrt(6) / math.pi, 1e-6)
        location = float(best.mean()) - _EULER * scale
        return cls(location=location, scale=scale, count=len(best), moments=moments, recall=recall)

    def probability(self, z: float) -> float:
        """Return the probability that a hit with this z answers the query."""
        p = -math.expm1(-math.exp(-(z - self.location) / self.scale))
        if p <= 0:
            return 1.0
        even = 0.5 * (1 - p) / (1 - 1 / math.e) if p >= 1 / math.e else 1 / (1 - math.e * p * math.log(p))
        before = self.recall / 2
        return even * before / (even * before + (1 - even) * (1 - before))


def recall_of(model: Model) -> float:
    """Return R@1, text to video, of the test of the model's run as a share; UNKNOWN_RECALL without a test."""
    folder = Path(model.source)
    for path in (folder / RESULTS, *(parent / RESULTS for parent in folder.parents[:2])):
        if model.run is not None and path.is_file():
            rows = json.loads(path.read_text(encoding="utf-8"))
            tested = [row for name, row in rows.items() if ", step " in name and "+" not in name]
            if tested:
                return min(max(tested[-1]["t2v"]["R@1"] / 100, 0.01), 1.0)
    return UNKNOWN_RECALL


def random_captions(model: Model) -> list[str]:
    """Return captions of videos that are not in the index.

    They are of the training split of the model's run, of the drawn world for the CLIP of that world, and
    general sentences for any other model and if the manifest of the run can no longer be read.
    """
    generator, config = random.Random(0), None if model.run is None else model.run.config
    if model.source == DRAWN:
        rng = np.random.default_rng(0)
        return [phrase(tell(make_scene(0, "train", i), rng), rng) for i in range(CAPTIONS)]
    if config is not None and config.data.stills is None:
        try:
            clips = read_clips(config.data, config.data.train_split)
        except (ValueError, OSError) as error:
            logger.warning(
                "calibration: training captions cannot be read, general sentences are used: %s", error
            )
        else:
            captions = sorted({caption for clip in clips for caption in clip.captions})
            return generator.sample(captions, min(CAPTIONS, len(captions)))
    every = [f"{who} {what} {where}" for who in _SUBJECTS for what in _ACTIONS for where in _PLACES]
    return generator.sample(every, CAPTIONS)


def standardised(scores: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Return z of scores, given those of the same query with many moments."""
    return (scores - background.mean()) / max(float(background.std()), 1e-9)


def note(best: float | None, hits: int) -> str:
    """Return a line about the best hit if it is probably not what was asked for."""
    if not hits:
        return "nothing to search: the index is empty, or no moment fulfils the condition"
    if best is not None and best < 0.5:
        return (
            f"probably nothing found: the best hit is right with a probability of {best:.0%}; "
            "captions of other videos score as high"
        )
    return ""


def enough(captions: Sequence[str], moments: int) -> bool:
    """Return True if an index can be calibrated."""
    return moments >= LEAST and len(captions) >= LEAST
